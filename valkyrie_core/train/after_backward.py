"""The usual optimizer step: after the backward pass, with all gradients at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from valkyrie_core.train.optim import Optimizers
from valkyrie_core.train.weights import non_finite


class StepAfterBackward:
    """Clips all gradients by their global norm and updates; or updates nothing."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        clip_norm: float,
        diverged: Callable[[str], Exception],
    ) -> None:
        """
        Args:
            clip_norm: all gradients together are scaled down to this norm.
            diverged: makes what is raised for gradients that are not finite, from a sentence about
                them; nothing was updated then.
        """
        self._model = model
        self._optimizers = optimizers
        self._clip_norm = clip_norm
        self._diverged = diverged

    def finish(self, loss: float) -> float:
        """Uses the gradients of a step with this loss; returns their global norm unclipped."""
        norm = self._finite_norm(loss)
        clip_grads_with_norm_(self._model.parameters(), self._clip_norm, norm)
        self._optimizers.step()
        self._optimizers.zero_grad()
        return float(norm)

    def _finite_norm(self, loss: float) -> Tensor:
        gradients = {
            name: parameter.grad
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None
        }
        norm = get_total_norm(gradients.values())
        if bool(torch.isfinite(norm)):
            return norm
        names = non_finite(gradients)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            where = f"the gradients of {', '.join(names[:5])}{more} are not finite"
        else:
            where = "the gradients are finite, but their norm is not"
        raise self._diverged(f"the loss of the next step is {loss:.4g} and {where}")
