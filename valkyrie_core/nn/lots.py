"""A router that looks at nothing: mixers are drawn, as often as a budget allows.

A control: what a learned router is worth is what it is better by.

Shapes: B batch, T time, D model, M mixers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from valkyrie_core.nn.state import Ctx


class Lots(nn.Module):
    """Draws a mixer by a token's position in its document and by the layer."""

    def __init__(self, costs: Sequence[float], budget: float, layer: int) -> None:
        """
        Args:
            costs: operations of every mixer, as the budget counts them.
        """
        super().__init__()
        self.each = lots(costs, budget)
        """How often each mixer is drawn."""
        self.layer = layer

    def forward(
        self, x_BTD: Tensor, smooth_BM: Tensor, held_BM: Tensor, ctx: Ctx
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B, T, M] by which the mixer that was drawn has the whole gate; nothing is
        remembered."""
        below_M = torch.tensor(self.each, dtype=torch.float64, device=x_BTD.device).cumsum(0)
        lot_BT1 = drawn_at(ctx.pos_BT, self.layer)[:, :, None]
        # the last one has what rounding leaves over
        number_BT1 = (lot_BT1 >= below_M[:-1]).sum(-1, keepdim=True)
        scores_BTM = x_BTD.new_full((*ctx.pos_BT.shape, len(self.each)), -torch.inf)
        return scores_BTM.scatter(-1, number_BT1, 0.0), smooth_BM, held_BM

    def flops(self, context_len: int) -> tuple[int, int]:
        """Nothing is multiplied."""
        return 0, 0


def lots(shares: Sequence[float], budget: float) -> tuple[float, ...]:
    """How often mixers of these costs are drawn: all alike, or the cheapest so much more often
    that the mean is the budget. The cheapest alone may cost more: then it is always drawn."""
    cheapest, mean = min(shares), sum(shares) / len(shares)
    alike = 1.0 if mean <= budget else max(0.0, (budget - cheapest) / (mean - cheapest))
    each = [alike / len(shares)] * len(shares)
    each[list(shares).index(cheapest)] += 1 - alike
    return tuple(each)


def drawn_at(pos_BT: Tensor, layer: int) -> Tensor:
    """A number in [0, 1) that looks drawn, of every position: the same wherever it is read."""
    # a hash of whole numbers (Wang's), as floats would differ between devices
    mixed_BT = (pos_BT + 1) * 668_265_261 + layer * 374_761_393
    for shift, factor in ((15, 739_982_445), (13, 695_872_825)):
        mixed_BT = ((mixed_BT & 0xFFFF_FFFF) ^ ((mixed_BT & 0xFFFF_FFFF) >> shift)) * factor
    return (mixed_BT >> 8 & 0xFF_FFFF).double() / 2**24
