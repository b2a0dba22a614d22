"""What a router's scores are made of in time: the token's own, and those before it.

Shapes: B batch, T time, M mixers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from valkyrie_core.nn.state import Ctx

SCAN = 128
"""Tokens whose scores are smoothed at one time."""


def smoothed(scores_BTM: Tensor, before_BM: Tensor, ctx: Ctx, adaptation: float) -> Tensor:
    """s_t = s_{t-1} + adaptation (scores_t - s_{t-1}) inside of documents; s = scores at their
    first token. Padding changes nothing.
    """
    if adaptation == 1 and ctx.valid_BT is None:
        return scores_BTM
    first_BT = ctx.pos_BT == 0 if ctx.fresh_BT is None else ctx.fresh_BT
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
