"""What native code is given: pointers, so that nothing wrong may reach it.

The checks stand inside the operators, where a compiled graph does not see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def expect(name: str, tensor: Tensor | None, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """Refuses a tensor of another shape or type; None passes.

    Raises:
        ValueError: says which tensor, what it is, and what it should be.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not {wanted}")


def once_differentiable(library: torch.library.Library, operator: str) -> None:
    """Lets a backward operator say that it has no gradient itself, rather than pass on zeros."""

    def refuse(*args: Any) -> Any:
        raise RuntimeError(
            f"{operator} has no second derivative; VALKYRIE_NATIVE=0 computes in PyTorch, "
            "which has one"
        )

    torch.library.register_autograd(operator, refuse, lib=library)
