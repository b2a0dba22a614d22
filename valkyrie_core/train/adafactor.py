"""torch's Adafactor, with fp32 arithmetic and random rounding for matrices stored in bf16.

Shazeer & Stern 2018 (arXiv 1804.04235). The second moment of a matrix is kept as one number per row
and one per column, and there is no first moment: the optimizer remembers next to nothing. A bf16
number has 8 bits: an update smaller than a 256th of a weight would be rounded away, every time. So
an update is computed in fp32 and rounded up or down at random, with the chances that keep its mean
(Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 1 << 24
"""Numbers that are rounded at once: what is drawn for them stays small."""


class Adafactor(torch.optim.Adafactor):
    """torch.optim.Adafactor; a bf16 parameter's state and arithmetic are fp32.

    What is drawn depends on a parameter's place in the optimizer and its number of steps alone, not
    on the order in which parameters are updated.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._places = {parameter: place for place, parameter in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        gradients = {
            parameter: parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        narrow = [parameter for parameter in gradients if parameter.dtype == torch.bfloat16]
        for parameter in narrow:
            parameter.grad = None
        self._step()
        # one at a time: fp32 copies of all of them would be the memory that bf16 saves
        for parameter in gradients:
            parameter.grad = None
        for parameter in narrow:
            self._step_in_fp32(parameter, gradients[parameter])
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return None

    def _step(self) -> None:
        super().step()  # type: ignore[no-untyped-call]

    def _step_in_fp32(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        stored = parameter.data
        parameter.data = stored.float()
        parameter.grad = gradient.float()
        self._step()
        step = int(self.state[parameter]["step"])
        generator = torch.Generator(stored.device).manual_seed(
            (self._places[parameter] << 40) + step
        )
        round_into(stored, parameter.data, generator)
        parameter.grad = None
        parameter.data = stored


def round_into(stored: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """Writes fp32 numbers into a bf16 tensor, each to one of its two neighbours at random.

    The chance of a neighbour is its nearness, so that the mean is the number itself. What bf16 can
    hold is kept as it is.
    """
    flat, exact = stored.view(-1), exact.reshape(-1)
    for start in range(0, flat.numel(), AT_ONCE):
        piece = exact[start : start + AT_ONCE]
        # bf16 is the upper half of fp32: adding up to 2^16 - 1 carries by chance
        draws = torch.empty(-(-piece.numel() // 4), dtype=torch.int64, device=flat.device)
        draws.random_(-(2**63), None, generator=generator)
        lower = draws.view(torch.int16)[: piece.numel()].to(torch.int32) & 0xFFFF
        upper = (piece.view(torch.int32) + lower) & -0x10000
        flat[start : start + AT_ONCE] = upper.view(torch.float32).to(torch.bfloat16)
