"""A model's state as named tensors and back: for checkpoints and state files.

A name is the path to the tensor: `layers/0/0/wkv_BNHH`. Caches are stored without their spare room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.state import LMState

FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class MisfitStateError(ValueError):
    """The tensors are not a state of this model."""


def state_tensors(state: LMState) -> dict[str, Tensor]:
    """Every tensor of a state, by its path: copies of what the state sees, and no more."""
    found: dict[str, Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, KVState):
            value = kv_cache.stored(value)
        if isinstance(value, Tensor):
            # copies: parts of a state may share memory, which safetensors refuses
            found[path] = value.detach().clone(memory_format=torch.contiguous_format)
            return
        names = getattr(value, "_fields", range(len(value)))
        for name, item in zip(names, value, strict=True):
            walk(f"{path}/{name}" if path else str(name), item)

    walk("", state)
    return found


def state_from_tensors(template: LMState, tensors: Mapping[str, Tensor]) -> LMState:
    """The state that `state_tensors` stored.

    Args:
        template: a state of the same model and batch size: `model.init_state(batch_size)`.

    Raises:
        MisfitStateError: names, shapes or types are not those of the model's states.
    """
    left = dict(tensors)

    def take(path: str, like: Tensor, *, growing: int | None = None) -> Tensor:
        if path not in left:
            raise MisfitStateError(f"it lacks {path}")
        tensor = left.pop(path)
        shape, expected = list(tensor.shape), list(like.shape)
        if growing is not None and len(shape) == len(expected):
            expected[growing] = shape[growing]
        if shape != expected:
            raise MisfitStateError(f"{path} has shape {shape} instead of {expected}")
        if tensor.dtype != like.dtype and not {tensor.dtype, like.dtype} <= FLOATING:
            raise MisfitStateError(f"{path} is {tensor.dtype} instead of {like.dtype}")
        return tensor.to(like.device)

    def build(path: str, like: Any) -> Any:
        if isinstance(like, Tensor):
            return take(path, like)
        names = getattr(like, "_fields", range(len(like)))
        if isinstance(like, KVState):
            parts = [
                take(f"{path}/{name}", part, growing=dim)
                for name, part, dim in kv_cache.growing(like)
            ]
            try:
                return kv_cache.restored(*parts)
            except ValueError as error:
                raise MisfitStateError(f"{path}: {error}") from error
        items = [
            build(f"{path}/{name}" if path else str(name), item)
            for name, item in zip(names, like, strict=True)
        ]
        return type(like)(*items) if hasattr(like, "_fields") else tuple(items)

    state: LMState = build("", template)
    if left:
        raise MisfitStateError(f"it has {min(left)}, which no state of this model has")
    return state
