"""Matrices that are stored in fewer bits than the model computes in.

What is multiplied by (and the embedding) may be kept in bf16: half the memory and half the
checkpoint. Vectors, norms and the residual stream stay in fp32. Under bf16 autocast the matrices
are used as they are stored; elsewhere every layer widens its own while it runs, which costs a pass
over them and no lasting memory, if activations are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from valkyrie_core.nn.layers import Role, parameter_roles

MATRICES: frozenset[Role] = frozenset({"matrix", "embedding", "head", "low_rank"})
"""The roles of what is stored in fewer bits."""


def store(module: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the module's matrices in another type, in place."""
    for name, role in parameter_roles(module).items():
        if role in MATRICES:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.to(dtype)


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in the type that it is multiplied in; under autocast that is autocast's business."""
    if torch.is_autocast_enabled(weight.device.type):
        return weight
    return weight.to(dtype)


def call(module: nn.Module, x: Tensor, *args: Any) -> Any:
    """`module(x, *args)`, its matrices in the type of `x` where no autocast sees to that."""
    narrow = {name: p for name, p in module.named_parameters() if p.dtype == torch.bfloat16}
    if not narrow or x.dtype == torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
        return module(x, *args)
    wide = {name: parameter.to(x.dtype) for name, parameter in narrow.items()}
    return functional_call(module, wide, (x, *args))
