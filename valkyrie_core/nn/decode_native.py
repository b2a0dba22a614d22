"""What native steps are made of: packed weights, a structure, its function.

Shapes: B batch (at most 8), D model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.kernels import decode as kernel
from valkyrie_core.kernels.arena import Arena
from valkyrie_core.nn.state import Ctx
from valkyrie_core.nn.weights import Weights


class Step(Protocol):
    """One residual sub-layer for one token; values in, values out."""

    def __call__(
        self, x_BD: Tensor, state: Any, ctx: Ctx, queue: kernel.Queue
    ) -> tuple[Tensor, Any, Ctx]:
        """x + mixer(norm(x)), the state after it, and the context for deeper layers.

        A native step only joins the queue: the numbers are there once it has run.
        """
        ...


class PackedWeights:
    """Packs weights for a structure, and keeps what it points to."""

    def __init__(self, weights: Weights, arena: Arena) -> None:
        self._weights: Weights = weights
        self._arena = arena
        self._kept: list[object] = []

    def matrix(self, weight_RC: Tensor) -> kernel.Matrix:
        """A matrix, rows by outputs."""
        packed = kernel.pack(weight_RC, self._weights, self._arena)
        self._kept += packed.memory
        return packed.matrix

    def matrices(self, weight_ERC: Tensor) -> int:
        """Matrices, one behind the other."""
        packed = (kernel.Matrix * len(weight_ERC))(*map(self.matrix, weight_ERC))
        self._kept.append(packed)
        return ctypes.addressof(packed)

    def vector(self, x: Tensor) -> int:
        """A copy, padded with zeros to whole groups."""
        flat = x.detach().float().flatten()
        copied = F.pad(flat, (0, -flat.numel() % kernel.GROUP)).clone()
        self._kept.append(copied)
        return copied.data_ptr()

    def norm(self, norm: nn.Module) -> kernel.Norm:
        """A LayerNorm or an RMSNorm."""
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        bias = self.vector(norm.bias) if isinstance(norm, nn.LayerNorm) else None
        return kernel.Norm(self.vector(norm.weight), bias, eps_of(norm))


def eps_of(norm: nn.LayerNorm | nn.RMSNorm) -> float:
    return torch.finfo(torch.float32).eps if norm.eps is None else norm.eps


class Native:
    """A structure and its function."""

    def __init__(self, weights: Weights, arena: Arena, lib: ctypes.CDLL, name: str) -> None:
        self._pack = PackedWeights(weights, arena)
        self._step = kernel.address(getattr(lib, name))
        self._measure: Callable[..., int] = getattr(lib, f"{name}_scratch")
        self._sizes: dict[tuple[int, int], int] = {}
        self._at = 0

    def _keep(self, structure: ctypes.Structure) -> None:
        self._structure = structure
        self._at = ctypes.addressof(structure)

    def _size(self, queue: kernel.Queue) -> int:
        """Bytes of scratch memory."""
        key = (queue.B, queue.threads)
        size = self._sizes.get(key)
        if size is None:
            size = self._sizes[key] = self._measure(self._at, *key)
        return size


def plain(x: Tensor) -> Tensor:
    """The same values, contiguous in fp32."""
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()
