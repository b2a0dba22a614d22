"""Optimizer steps inside the backward pass: no gradient outlives its parameter's update.

Lv et al. 2023 (LOMO, arXiv 2306.09782). The gradients of a model are as large as its weights; here
at most a layer's exist at one time. The price: nothing can be accumulated, the global norm is known
only when everything has been updated, so that every parameter is clipped by its own norm, and a
gradient that is not finite is found when others have been used already.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from valkyrie_core.kernels.adafactor import norm as norm_of
from valkyrie_core.train.optim import Optimizers


class StepInBackward:
    """Updates each parameter of a model from the backward pass, by hooks."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        clip_norm: float,
        diverged: Callable[[str], Exception],
    ) -> None:
        """
        Args:
            clip_norm: a parameter's gradient is scaled down to this norm.
            diverged: makes what is raised for a gradient that is not finite, from a sentence about
                it; the weights are then of no use any more.
        """
        self._optimizers = optimizers
        self._clip_norm = clip_norm
        self._diverged = diverged
        self._square_sum = 0.0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._hook(name))  # type: ignore[no-untyped-call]

    def finish(self, loss: float) -> float:
        """Ends a step whose updates are done; returns the global norm before clipping."""
        norm, self._square_sum = math.sqrt(self._square_sum), 0.0
        return norm

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = norm_of(parameter.grad)
            if not math.isfinite(norm):
                raise self._diverged(f"the gradient of {name} is not finite")
            self._square_sum += norm * norm
            if norm > self._clip_norm:
                parameter.grad.mul_(self._clip_norm / norm)
            self._optimizers.step_one(parameter)
            parameter.grad = None

        return update
