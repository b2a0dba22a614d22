"""torch's Adafactor, with fp32 arithmetic and random rounding for matrices stored in bf16.

Shazeer & Stern 2018 (arXiv 1804.04235). The second moment of a matrix is kept as one number per row
and one per column, and there is no first moment: the optimizer remembers next to nothing. What
bf16 asks for is in `kernels/adafactor.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from valkyrie_core.kernels import adafactor as kernel


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
        due = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        narrow = [one for one in due if one[0].dtype == torch.bfloat16]
        for parameter, _, _ in narrow:
            parameter.grad = None
        self._step()
        # one at a time: fp32 copies of all of them would be the memory that bf16 saves
        for parameter, _, _ in due:
            parameter.grad = None
        for parameter, gradient, group in narrow:
            if kernel.serves(parameter):
                self._step_natively(parameter, gradient, group)
            else:
                self._step_in_fp32(parameter, gradient)
        for parameter, gradient, _ in due:
            parameter.grad = gradient
        return None

    def _step(self) -> None:
        super().step()  # type: ignore[no-untyped-call]

    def _step_natively(
        self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            # what torch's own would begin with, in fp32
            rows, columns = parameter.shape
            state["step"] = torch.tensor(0.0)
            state["row_var"] = torch.zeros(rows, 1)
            state["col_var"] = torch.zeros(1, columns)
        state["step"] += 1
        step = float(state["step"])
        epsilon, least_scale = group["eps"]
        kernel.adafactor_(
            *(parameter, gradient, state["row_var"], state["col_var"]),
            rate=min(group["lr"], step**-0.5),
            share=step ** group["beta2_decay"],
            epsilon=torch.finfo(torch.float32).eps if epsilon is None else epsilon,
            least_scale=least_scale,
            d=group["d"],
            decay=group["lr"] * group["weight_decay"],
            seed=self._seed(parameter),
        )

    def _step_in_fp32(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        stored = parameter.data
        parameter.data = stored.float()
        parameter.grad = gradient.float()
        self._step()
        kernel.round_into(stored, parameter.data, self._seed(parameter))
        parameter.grad = None
        parameter.data = stored

    def _seed(self, parameter: nn.Parameter) -> int:
        """64 bits that no other parameter and no other step has."""
        return (self._places[parameter] << 32) + int(self.state[parameter]["step"])
