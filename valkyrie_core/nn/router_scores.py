"""A learned router: what its scores are made of at a token, and in time of those before it.

Shapes: B batch, T time, D model, M mixers.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.state import Ctx

SCAN = 128
"""Tokens whose scores are smoothed at one time."""


class Router(nn.Module):
    """Scores of mixers by a linear map of the token, smoothed and held for blocks."""

    roles: ClassVar[dict[str, Role]] = {"weight_MD": "router", "bias_M": "router"}

    def __init__(self, dim: int, num_mixers: int, *, adaptation: float, block_len: int) -> None:
        super().__init__()
        self.adaptation, self.block_len = adaptation, block_len
        self.weight_MD = nn.Parameter(torch.empty(num_mixers, dim))
        self.bias_M = nn.Parameter(torch.zeros(num_mixers))
        nn.init.normal_(self.weight_MD, std=0.1 / math.sqrt(dim))

    def forward(
        self, x_BTD: Tensor, smooth_BM: Tensor, held_BM: Tensor, ctx: Ctx
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B, T, M] of a window, and what the next one goes on from."""
        weight_MD, bias_M = self.weight_MD.to(x_BTD.dtype), self.bias_M.to(x_BTD.dtype)
        scores_BTM = F.linear(x_BTD, weight_MD, bias_M)
        scores_BTM = smoothed(scores_BTM, smooth_BM, ctx, self.adaptation)
        smooth_BM = scores_BTM[:, -1]
        scores_BTM = held(scores_BTM, held_BM, ctx, self.block_len)
        return scores_BTM, smooth_BM, scores_BTM[:, -1]

    def flops(self, context_len: int) -> tuple[int, int]:
        """Forward operations per token: of the map, and of smoothing."""
        mixers = len(self.bias_M)
        return 2 * self.weight_MD.numel(), mixers * smoothing_flops(context_len, self.adaptation)


def smoothed(scores_BTM: Tensor, before_BM: Tensor, ctx: Ctx, adaptation: float) -> Tensor:
    """s_t = s_{t-1} + adaptation (scores_t - s_{t-1}) inside of documents; s = scores at their
    first token. Padding changes nothing.
    """
    if adaptation == 1 and ctx.valid_BT is None:
        return scores_BTM
    first_BT = ctx.first_BT
    pieces = []
    for start in range(0, scores_BTM.shape[1], SCAN):
        piece = slice(start, start + SCAN)
        first, own = first_BT[:, piece], scores_BTM[:, piece]
        real = torch.ones_like(first) if ctx.valid_BT is None else ctx.valid_BT[:, piece]
        document, count = first.cumsum(1), real.cumsum(1)
        T = own.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=own.device).tril()
        same = (document[:, :, None] == document[:, None, :]) & causal & real[:, None, :]
        weight = torch.where(first, 1.0, adaptation).to(own.dtype)
        # a power of 0, where adaptation is 1, is 1 at no distance
        apart = (count[:, :, None] - count[:, None, :]).clamp(min=0)
        matrix = (1 - adaptation) ** apart.to(own.dtype) * weight[:, None, :]
        out = matrix.masked_fill(~same, 0) @ own
        left = ((1 - adaptation) ** count.to(own.dtype)).masked_fill(document > 0, 0)
        out = out + left[:, :, None] * before_BM[:, None].to(own.dtype)
        before_BM = out[:, -1]
        pieces.append(out)
    return torch.cat(pieces, dim=1)


def held(scores_BTM: Tensor, before_BM: Tensor, ctx: Ctx, block_len: int) -> Tensor:
    """At every token the scores of the latest one that began a block."""
    if block_len == 1:
        return scores_BTM
    leads_BT = ctx.pos_BT % block_len == 0
    if ctx.valid_BT is not None:
        leads_BT = leads_BT & ctx.valid_BT
    steps_T = torch.arange(scores_BTM.shape[1], device=scores_BTM.device)
    latest_BT = torch.where(leads_BT, steps_T, -1).cummax(dim=1).values
    index_BTM = latest_BT.clamp(min=0)[:, :, None].expand_as(scores_BTM)
    led_BTM = scores_BTM.gather(1, index_BTM)
    return torch.where((latest_BT < 0)[:, :, None], before_BM[:, None].to(led_BTM.dtype), led_BTM)


def smoothing_flops(context_len: int, adaptation: float) -> int:
    """Forward operations per token and mixer."""
    if adaptation == 1:
        return 0
    whole, rest = divmod(context_len, SCAN)
    return 2 * (whole * SCAN**2 + rest**2) // context_len
