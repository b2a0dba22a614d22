"""Some tokens of a window, side by side: what the others would cost is saved.

Tokens keep their positions and documents; what is left over at the end of a row is padding, which
changes nothing. A document's first token has to be among them wherever any other one of it is: it
tells the layers that a document starts.

Shapes: B batch, T time, K selected tokens of a row at most, D model, R selected tokens of all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.nn.state import Ctx

PADDING = -1


class Selection(NamedTuple):
    """Which tokens they are."""

    index_BK: Tensor
    """Their places, in order; after them places of tokens that are not selected."""
    real_BK: Tensor
    """Which of these are selected."""

    def take(self, x_BT: Tensor) -> Tensor:
        """[B, K, ...]: what a window has at these places."""
        rows_B1 = torch.arange(len(x_BT), device=x_BT.device)[:, None]
        return x_BT[rows_B1, self.index_BK]

    def put(self, x_BT: Tensor, new_BK: Tensor) -> Tensor:
        """The window with new values at the selected tokens."""
        rows_BK, index_BK = self.places()
        x_BT = x_BT.clone()
        x_BT[rows_BK, index_BK] = new_BK[self.real_BK]
        return x_BT

    def places(self) -> tuple[Tensor, Tensor]:
        """(rows, places) [R] of the selected tokens."""
        rows_B1 = torch.arange(len(self.index_BK), device=self.index_BK.device)[:, None]
        return rows_B1.expand_as(self.index_BK)[self.real_BK], self.index_BK[self.real_BK]

    def context(self, ctx: Ctx) -> Ctx:
        """What the layers of a forward pass share, for these tokens alone."""
        steps_K = torch.arange(self.index_BK.shape[1], device=self.index_BK.device)
        doc_BT = ctx.segment_BT if ctx.doc_BT is None else ctx.doc_BT
        padded = not bool(self.real_BK.all())
        several = ctx.packed or padded
        told = ctx.fresh_BT is not None or several
        return ctx._replace(
            pos_BT=self.take(ctx.pos_BT),
            segment_BT=self.take(ctx.segment_BT),
            doc_BT=self.take(doc_BT).masked_fill(~self.real_BK, PADDING) if several else None,
            fresh_BT=self.take(ctx.first_BT) & self.real_BK if told else None,
            packed=several,
            gaps=True,
            valid_BT=self.real_BK if padded else None,
            latest_BT=torch.minimum(steps_K, self.real_BK.sum(1, keepdim=True)) if padded else None,
            v_first_BTD=None if ctx.v_first_BTD is None else self.take(ctx.v_first_BTD),
        )


def select(active_BT: Tensor) -> Selection:
    """The tokens that are marked."""
    count = int(active_BT.sum(1).max())
    order_BT = active_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    index_BK = order_BT[:, :count]
    return Selection(index_BK, active_BT.gather(1, index_BK))
