"""Experts: stacked weights, one matrix product for each expert's own tokens.

Shapes: R tokens, D model, E experts, H hidden, M entries (a token at one of its experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from valkyrie_core.config import Config
from valkyrie_core.kernels import rows
from valkyrie_core.kernels.gated import silu_times
from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.moe.dispatch import Entries
from valkyrie_core.nn.state import Ctx


class MlpConfig(Config):
    """Every expert is a SwiGLU."""

    type: Literal["mlp"] = "mlp"
    hidden_dim: int | None = Field(default=None, ge=1)
    """Width of an expert's hidden layer; left out, what makes a token's experts as wide together as
    a dense SwiGLU: 8/3 x dim / slots, rounded up to a multiple of 16."""

    def width(self, dim: int, slots: int) -> int:
        """The hidden width."""
        return self.hidden_dim or -(-dim * 8 // (3 * slots * 16)) * 16

    def build(self, dim: int, num_experts: int, slots: int) -> MlpExperts:
        """The module this section describes."""
        return MlpExperts(dim, num_experts, self.width(dim, slots))


class MlpExperts(nn.Module):
    """E SwiGLUs in three stacked weights; has no state."""

    roles: ClassVar[dict[str, Role]] = {
        "gate_EHD": "matrix",
        "up_EHD": "matrix",
        "down_EDH": "matrix",
    }

    def __init__(self, dim: int, num_experts: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_EHD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.up_EHD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.down_EDH = nn.Parameter(torch.zeros(num_experts, dim, hidden_dim))
        for weight in (*self.gate_EHD, *self.up_EHD):
            nn.init.orthogonal_(weight)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def forward(
        self, x_RD: Tensor, plan: Entries, state: tuple[()], ctx: Ctx
    ) -> tuple[Tensor, tuple[()]]:
        """What every entry's expert makes of its token: [M, D]."""
        # rounded before there are several of each
        x_MD = rows.spread(as_computed(x_RD), plan.places_RK, sum(plan.sizes))
        return self.mlp(x_MD, plan), state

    def mlp(self, x_MD: Tensor, plan: Entries) -> Tensor:
        """[M, D]: every entry by its own expert's SwiGLU."""
        hidden_MH = silu_times(
            grouped_linear(x_MD, self.gate_EHD, plan.sizes),
            grouped_linear(x_MD, self.up_EHD, plan.sizes),
        )
        return grouped_linear(hidden_MH, self.down_EDH, plan.sizes)

    def flops_per_entry(self, context_len: int, slots: int) -> int:
        """Forward operations for a token at one expert, averaged over a context."""
        return 2 * 3 * self.up_EHD[0].numel()

    def repeated_per_entry(self, context_len: int, slots: int) -> int:
        """Operations that the backward pass does besides twice those of the forward pass."""
        return 0

    def state_bytes(self, context_len: int, slots: int, value_bytes: int) -> int:
        """What is remembered of one sequence."""
        return 0


def as_computed(x: Tensor) -> Tensor:
    """In the type of matrix products: autocast's, where there is one."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[M, O]: rows multiplied by their own expert's matrix, the first `sizes[0]` by the first's."""
    x_MI, weight_EOI = as_computed(x_MI), as_computed(weight_EOI)
    if x_MI.device.type == "cuda" and x_MI.dtype == torch.bfloat16:
        stops_E = torch.tensor(sizes, device=x_MI.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=stops_E)
    y_MO: Tensor = _GroupedLinear.apply(x_MI, weight_EOI, sizes)  # type: ignore[no-untyped-call]
    return y_MO


class _GroupedLinear(torch.autograd.Function):
    """Every product goes where it belongs: nothing is cut, joined or added up afterwards.

    In bf16 on a CPU an expert's rows are rounded up to one of few numbers: oneDNN makes code for
    every shape that it meets, which takes as long as a small product and is kept, half a megabyte
    each. What is computed too much is the next expert's, and overwritten by it.
    """

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_EOI: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI)
        ctx.sizes = sizes
        return _products(x_MI, weight_EOI.mT, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MI, weight_EOI = ctx.saved_tensors
        dy_MO = dy_MO.contiguous()
        dweight_EOI = torch.empty_like(weight_EOI)
        for expert, size in enumerate(ctx.sizes):
            if not size:
                dweight_EOI[expert] = 0
        for expert, start, size, rounded in _windows(ctx.sizes, x_MI):
            window = _window(x_MI, start, size, rounded)
            with _alone(dy_MO, start, size, rounded) as own:
                torch.mm(own.t(), window, out=dweight_EOI[expert])
        return _products(dy_MO, weight_EOI, ctx.sizes), dweight_EOI, None


def _products(x_MI: Tensor, weight_EIO: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[M, O]: the rows of each expert times its matrix."""
    windows = list(_windows(sizes, x_MI))
    end = max((start + rounded for _, start, _, rounded in windows), default=0)
    y_MO = x_MI.new_empty(max(end, x_MI.shape[0]), weight_EIO.shape[2])
    for expert, start, size, rounded in windows:
        window = _window(x_MI, start, size, rounded)
        torch.mm(window, weight_EIO[expert], out=y_MO[start : start + rounded])
    return y_MO[: x_MI.shape[0]]


def _windows(sizes: tuple[int, ...], x_MI: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(expert, first row, rows, rows rounded up) of the experts that have any."""
    rounds = x_MI.dtype == torch.bfloat16 and x_MI.device.type == "cpu"
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, start, size, rounded_up(size) if rounds else size
        start += size


def rounded_up(size: int) -> int:
    """A multiple of 64, and of an eighth of the next smaller power of two: where there are many,
    6 % more on average."""
    grain = max(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // grain) * grain


def _window(x_MI: Tensor, start: int, size: int, rounded: int) -> Tensor:
    """So many rows from the first one on: an expert's, and whatever follows."""
    if start + rounded <= x_MI.shape[0]:
        return x_MI[start : start + rounded]
    return _padded(x_MI, start, size, rounded)


@contextmanager
def _alone(x_MI: Tensor, start: int, size: int, rounded: int) -> Iterator[Tensor]:
    """An expert's rows, and zeros; where others follow, they are zeros meanwhile."""
    if start + rounded > x_MI.shape[0] or rounded == size:
        yield _padded(x_MI, start, size, rounded)
        return
    others = x_MI[start + size : start + rounded]
    kept = others.clone()
    others.zero_()
    try:
        yield x_MI[start : start + rounded]
    finally:
        others.copy_(kept)


def _padded(x_MI: Tensor, start: int, size: int, rounded: int) -> Tensor:
    """An expert's rows, and zeros."""
    rows = x_MI[start : start + size]
    if rounded == size:
        return rows
    padded = x_MI.new_zeros(rounded, x_MI.shape[1])
    padded[:size] = rows
    return padded
