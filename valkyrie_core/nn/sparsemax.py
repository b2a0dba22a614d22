"""Sparsemax: the point of the simplex that is nearest to the scores (arXiv 1602.02068).

    p = max(x - tau, 0), tau such that p sums to one

Unlike softmax it gives exact zeros, and where it does, exact zeros of the gradient:

    dx = s * (dp - mean of dp over the support), s = 1 where p > 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sparsemax(x: Tensor) -> Tensor:
    """Over the last dimension; -inf, which may not be all of a row, gets 0.

    Computed in fp32 or better, and given back in the type of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    p: Tensor = _Sparsemax.apply(x.to(wide))  # type: ignore[no-untyped-call]
    return p.to(x.dtype)


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # what is added to all scores changes nothing, and near zero digits are finer
        x = x - x.amax(-1, keepdim=True)
        descending = x.sort(dim=-1, descending=True).values
        total = descending.cumsum(-1)
        rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
        support = (1 + rank * descending > total).sum(-1, keepdim=True)
        tau = (total.gather(-1, support - 1) - 1) / support
        p = (x - tau).clamp(min=0)
        ctx.save_for_backward(p > 0)
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> Tensor:
        (support,) = ctx.saved_tensors
        inside = dp.masked_fill(~support, 0)
        mean = inside.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        dx: Tensor = (inside - mean).masked_fill(~support, 0)
        return dx
