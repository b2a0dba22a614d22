"""Weights in and out of a model, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from valkyrie_core.errors import CheckpointError
from valkyrie_core.nn.routers import settle_routers


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name; what is tied appears once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def load_model_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, *, rounds: bool = False
) -> None:
    """Copy weights into a model.

    Args:
        rounds: weights of another floating-point type are rounded to the model's.

    Raises CheckpointError, naming `source`, unless names, shapes and types all agree.
    """
    own = model_tensors(model)
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    problems = [f"lacks {name}" for name in sorted(missing)]
    problems += [f"has {name}, which this model lacks" for name in sorted(unknown)]
    for name in sorted(own.keys() & tensors.keys()):
        problems += _differences(name, tensors[name], own[name], rounds=rounds)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{source} does not fit: it {'; it '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    settle_routers(model)


def _differences(name: str, theirs: Tensor, ours: Tensor, *, rounds: bool) -> list[str]:
    if theirs.shape != ours.shape:
        return [f"has {name} of shape {list(theirs.shape)}, the model's is {list(ours.shape)}"]
    floating = theirs.is_floating_point() and ours.is_floating_point()
    if theirs.dtype != ours.dtype and not (rounds and floating):
        return [f"has {name} as {theirs.dtype}, the model's is {ours.dtype}"]
    return []


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or Inf."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
