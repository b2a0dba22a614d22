"""States that go on from one optimizer step to the next (truncated back-propagation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from valkyrie_core.errors import CheckpointError
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import LMState, detach
from valkyrie_core.nn.state_tensors import MisfitStateError, state_from_tensors, state_tensors


def carried(state: LMState) -> LMState:
    """What the next step begins with: no gradient, and no keys of documents that have ended."""

    def without(part: Any) -> Any:
        if isinstance(part, KVState):
            return kv_cache.forget(part, state.segment_B)
        if isinstance(part, tuple) and not hasattr(part, "_fields"):
            return tuple(map(without, part))
        return part

    return detach(state._replace(layers=without(state.layers)))


def to_tensors(states: Sequence[LMState]) -> dict[str, Tensor]:
    """The states of all micro-batches, for a checkpoint."""
    return {
        f"{index}/{name}": tensor
        for index, state in enumerate(states)
        for name, tensor in state_tensors(state).items()
    }


def from_tensors(
    model: HybridLM, micro_size: int, count: int, tensors: Mapping[str, Tensor]
) -> tuple[LMState, ...]:
    """What `to_tensors` stored. CheckpointError where it does not fit the model."""
    template = model.init_state(micro_size)
    found = []
    for index in range(count):
        prefix = f"{index}/"
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        try:
            found.append(state_from_tensors(template, own))
        except MisfitStateError as error:
            raise CheckpointError(f"the carried state of micro-batch {index}: {error}") from error
    return tuple(found)
