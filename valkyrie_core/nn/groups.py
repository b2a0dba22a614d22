"""Tokens in groups of equal size, of which the complete ones alone are seen: nothing of the future.

A group has the tokens of one document, in the order in which they come to a layer, and is complete
with its last one; what a document leaves over belongs to none. A group's summary is the mean of its
tokens, and from its last token on it may be known.

Shapes: B batch, T time of the window, D model, G groups that a row completes in the window at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.nn.state import Ctx


class Groups(NamedTuple):
    """The groups that the tokens of a window complete."""

    size: int
    end_BG: Tensor
    """The places of the tokens that complete one, in order; after them places of others."""
    real_BG: Tensor
    """Which of these complete one."""
    done_BT: Tensor
    """How many groups of the window are complete at each token, its own included."""
    member_BT: Tensor
    """The group of the window that a token becomes part of; G: of one that is still open when the
    window ends; G + 1: of none."""
    started_BT: Tensor
    """How many documents have started in the window."""
    rank_BT: Tensor
    """How many tokens of the document came before."""
    always: bool
    """Whether every row completes exactly G groups, known without a look."""

    def summaries(self, x_BTD: Tensor, open_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The means of the groups [B, G, D], and the sums of the tokens of groups still open.

        Args:
            open_BD: those sums before the window.
        """
        B, _, D = x_BTD.shape
        G = self.end_BG.shape[1]
        precise = torch.promote_types(x_BTD.dtype, torch.float32)
        sums = torch.zeros(B, G + 2, D, device=x_BTD.device, dtype=precise)
        index_BTD = self.member_BT[:, :, None].expand_as(x_BTD)
        sums = sums.scatter_add(1, index_BTD, x_BTD.to(precise))
        # what was open goes on in the first group, or stays open, unless its document ended
        same_B = self.started_BT.gather(1, self.end_BG[:, :1])[:, 0] == 0
        first_B = self.real_BG[:, 0] & same_B
        none_B = (self.done_BT[:, -1] == 0) & (self.started_BT[:, -1] == 0)
        open_BD = open_BD.to(precise)
        first_BD = sums[:, 0] + open_BD.masked_fill(~first_B[:, None], 0)
        left_BD = sums[:, G] + open_BD.masked_fill(~none_B[:, None], 0)
        means_BGD = torch.cat([first_BD[:, None], sums[:, 1:G]], dim=1) / self.size
        return means_BGD.to(x_BTD.dtype), left_BD

    def latest(self, y_BGD: Tensor, before_BD: Tensor) -> tuple[Tensor, Tensor]:
        """At every token what its document's latest complete group has [B, T, D], zeros before the
        first; and at the window's end.

        Args:
            before_BD: at the end of the window before.
        """
        known_BGD = torch.cat([before_BD[:, None].to(y_BGD.dtype), y_BGD], dim=1)
        rows_B1 = torch.arange(len(y_BGD), device=y_BGD.device)[:, None]
        start_BG = self.started_BT.gather(1, self.end_BG)
        start_BG = torch.cat([torch.zeros_like(start_BG[:, :1]), start_BG], dim=1)
        same_BT = start_BG.gather(1, self.done_BT) == self.started_BT
        out_BTD = known_BGD[rows_B1, self.done_BT].masked_fill(~same_BT[:, :, None], 0)
        # a copy: a view would keep the whole window alive with the state
        return out_BTD, out_BTD[:, -1].clone()

    @property
    def read_B(self) -> Tensor:
        """How many tokens of its document every row has read at the window's end."""
        return self.rank_BT[:, -1] + 1

    def context(self, ctx: Ctx) -> Ctx:
        """What the layers of a forward pass share, for groups in the place of tokens."""
        index_BG = self.rank_BT.gather(1, self.end_BG) // self.size
        # the number of a document in its row, as documents that complete no group leave no trace
        segment_BG = ctx.segment_BT.gather(1, self.end_BG)
        if self.always:
            return Ctx(index_BG, segment_BG)
        G = self.real_BG.shape[1]
        steps_G = torch.arange(G, device=self.end_BG.device)
        return Ctx(
            pos_BT=index_BG,
            segment_BT=segment_BG,
            doc_BT=segment_BG.masked_fill(~self.real_BG, -1),
            fresh_BT=(index_BG == 0) & self.real_BG,
            packed=True,
            valid_BT=self.real_BG,
            latest_BT=torch.minimum(steps_G, self.real_BG.sum(1, keepdim=True)),
        )


def find_groups(read_B: Tensor, ctx: Ctx, size: int) -> Groups:
    """The groups of a window.

    Args:
        read_B: how many tokens of its document every row has read before the window.
    """
    T = ctx.pos_BT.shape[1]
    G = -(-T // size)
    real_BT = torch.ones_like(ctx.pos_BT, dtype=torch.bool)
    if ctx.valid_BT is not None:
        real_BT = ctx.valid_BT
    count_BT = real_BT.cumsum(1)
    started_BT = torch.zeros_like(count_BT)
    rank_BT = read_B[:, None] + count_BT - 1
    if ctx.fresh_BT is not None:
        started_BT = ctx.fresh_BT.cumsum(1)
        begun_BT = torch.where(ctx.fresh_BT, count_BT - 1, -1).cummax(1).values
        rank_BT = torch.where(started_BT > 0, count_BT - 1 - begun_BT, rank_BT)
    ends_BT = real_BT & (rank_BT % size == size - 1)
    done_BT = ends_BT.cumsum(1)
    order_BT = ends_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    end_BG = order_BT[:, :G]
    # a token's group is the next one that is completed, if that is of its document
    next_BT = done_BT - ends_BT.long()
    is_left_BT = next_BT == done_BT[:, -1:]
    start_BG = started_BT.gather(1, end_BG)
    start_BT = torch.where(
        is_left_BT, started_BT[:, -1:], start_BG.gather(1, next_BT.clamp(max=G - 1))
    )
    member_BT = torch.where(is_left_BT, G, next_BT)
    member_BT = member_BT.masked_fill(~real_BT | (start_BT != started_BT), G + 1)
    return Groups(
        size=size,
        end_BG=end_BG,
        real_BG=ends_BT.gather(1, end_BG),
        done_BT=done_BT,
        member_BT=member_BT,
        started_BT=started_BT,
        rank_BT=rank_BT,
        always=T % size == 0 and ctx.fresh_BT is None and ctx.valid_BT is None,
    )
