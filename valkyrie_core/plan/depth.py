"""What a step of a deep model takes, from two shallow ones: repeats of a pattern cost the same.

Tracing a model of 36 layers takes half a minute, and a search asks for many. The peak is the
largest of several moments of a step; each grows evenly with depth, so that the estimate is exact
unless the largest moment is another one in the deep model, and then it is too low by a little.
"""

from __future__ import annotations

from typing import NamedTuple

from valkyrie_core.machine.hardware import Precision
from valkyrie_core.plan.seconds import Rates, step_seconds
from valkyrie_core.plan.trace import Training
from valkyrie_core.recipe import Recipe

SHALLOW = (2, 3)
"""Repeats of the pattern that are traced."""
DEEP = 5
"""From so many repeats on, the model is not traced whole."""


class StepEstimate(NamedTuple):
    """One optimizer step."""

    tensors: int
    """Bytes of all tensors at the peak."""
    seconds: float


class StepEstimator:
    """Estimates steps of recipes that differ little; what is the same is not built again."""

    def __init__(self, precision: Precision, rates: Rates) -> None:
        self._precision, self._rates = precision, rates
        self._built: dict[int, Training] = {}

    def __call__(self, recipe: Recipe) -> StepEstimate:
        """The largest step of a recipe's stages."""
        repeat = recipe.model.core.repeat
        if repeat < DEEP:
            return self._traced(recipe, repeat)
        one, other = (self._traced(recipe, shallow) for shallow in SHALLOW)
        more = (repeat - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
        return StepEstimate(
            tensors=one.tensors + round(more * (other.tensors - one.tensors)),
            seconds=one.seconds + more * (other.seconds - one.seconds),
        )

    def _traced(self, recipe: Recipe, repeat: int) -> StepEstimate:
        core = recipe.model.core.model_copy(update={"repeat": repeat})
        model = recipe.model.model_copy(update={"core": core})
        recipe = recipe.model_copy(update={"model": model})
        known = self._built.get(repeat)
        training = known.like(recipe, self._precision) if known else None
        training = training or Training(recipe, self._precision)
        self._built[repeat] = training
        step = training.largest_step()
        return StepEstimate(step.peak, step_seconds(step.work, self._rates))
