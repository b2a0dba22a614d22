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
    """Draws a mixer by a token's position in its document, in every layer and model anew."""

    def __init__(self, costs: Sequence[float], budget: float | None) -> None:
        """
        Args:
            costs: operations of every mixer, as the budget counts them.
            budget: how many a token takes on average; None: mixers are drawn alike often.
        """
        super().__init__()
        self.each = lots(list(costs), budget)
        """How often each mixer is drawn."""
        self.register_buffer("salt", torch.randint(2**31, ()))
        self.salt: Tensor
        """Of the lots: another model draws otherwise."""

    def forward(
        self, x_BTD: Tensor, smooth_BM: Tensor, held_BM: Tensor, ctx: Ctx
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B, T, M] by which the mixer that was drawn has the whole gate; nothing is
        remembered."""
        below_M = torch.tensor(self.each, dtype=torch.float64, device=x_BTD.device).cumsum(0)
        lot_BT1 = drawn_at(ctx.pos_BT, self.salt)[:, :, None]
        # the last one has what rounding leaves over
        number_BT1 = (lot_BT1 >= below_M[:-1]).sum(-1, keepdim=True)
        scores_BTM = x_BTD.new_full((*ctx.pos_BT.shape, len(self.each)), -torch.inf)
        return scores_BTM.scatter(-1, number_BT1, 0.0), smooth_BM, held_BM

    def flops(self, context_len: int) -> tuple[int, int]:
        """Nothing is multiplied."""
        return 0, 0


def lots(costs: Sequence[float], budget: float | None) -> tuple[float, ...]:
    """How often mixers of these costs are drawn, so that they cost the budget on average.

    All alike, if that is the budget, or if there is none; above it the cheapest one less often and
    then the costliest one more, below it the cheapest one more. A budget that none of this meets is
    met as nearly as it goes.
    """
    M = len(costs)
    cheapest, costliest = costs.index(min(costs)), costs.index(max(costs))

    def always(chosen: int) -> list[float]:
        return [float(m == chosen) for m in range(M)]

    without = [0.0 if m == cheapest else 1 / (M - 1) for m in range(M)]
    steps = [always(cheapest), [1 / M] * M, without, always(costliest)]
    if budget is None:
        return tuple(steps[1])
    means = [sum(a * b for a, b in zip(step, costs, strict=True)) for step in steps]
    for place in range(1, len(steps)):
        if budget <= means[place]:
            room = means[place] - means[place - 1]
            share = (budget - means[place - 1]) / room if room else 1.0
            share = min(1.0, max(0.0, share))
            pairs = zip(steps[place - 1], steps[place], strict=True)
            return tuple(a + share * (b - a) for a, b in pairs)
    return tuple(steps[-1])


def drawn_at(pos_BT: Tensor, salt: Tensor) -> Tensor:
    """A number in [0, 1) that looks drawn, of every position: the same wherever it is read."""
    # a hash of whole numbers (Wang's), as floats would differ between devices
    mixed_BT = (pos_BT + 1) * 668_265_261 + salt * 374_761_393
    for shift, factor in ((15, 739_982_445), (13, 695_872_825)):
        mixed_BT = ((mixed_BT & 0xFFFF_FFFF) ^ ((mixed_BT & 0xFFFF_FFFF) >> shift)) * factor
    return (mixed_BT >> 8 & 0xFF_FFFF).double() / 2**24
