"""What a step of a deep model takes, from two shallow ones: repeats of a pattern cost the same.

Tracing a model of 36 layers takes half a minute, and a search asks for many. The peak is the
largest of several moments of a step; each grows evenly with depth, so that the estimate is exact
unless the largest moment is another one in the deep model, and then it is too low by a little.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from valkyrie_core.machine.hardware import Precision
from valkyrie_core.plan.seconds import Rates, step_seconds
from valkyrie_core.plan.trace import StepMemory, Training, Work
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.stages import Stage

SHALLOW = (2, 3)
"""Repeats of the pattern that are traced."""
DEEP = 5
"""From so many repeats on, the model is not traced whole."""


class Depths:
    """A training, traced whole or at two smaller depths; see `Training`."""

    def __init__(self, recipe: Recipe, precision: Precision) -> None:
        """Builds one or two models without data."""
        repeat = recipe.model.core.repeat
        self.recipe = recipe
        self._repeats = SHALLOW if repeat >= DEEP else (repeat,)
        self._more = repeat - self._repeats[-1]
        self._trainings = [Training(_at_depth(recipe, n), precision) for n in self._repeats]

    def like(self, recipe: Recipe, precision: Precision) -> Depths:
        """The training of another recipe; what is the same is not built again."""
        if recipe.model != self.recipe.model:
            return Depths(recipe, precision)
        other = copy.copy(self)
        other.recipe = recipe
        pairs = zip(self._trainings, self._repeats, strict=True)
        other._trainings = [one.like(_at_depth(recipe, n), precision) for one, n in pairs]
        return other

    def number(self, of: Callable[[Training], int]) -> int:
        """What grows evenly with depth, at the recipe's own."""
        return self._at_full_depth([of(training) for training in self._trainings])

    def largest_step(self) -> StepMemory:
        """The step that takes the most, over all stages of the recipe."""
        return self._deep([one.largest_step() for one in self._trainings])

    def step(self, stage: Stage, *, recomputes: bool | None = None) -> StepMemory:
        """One whole step of a stage."""
        return self._deep([one.step(stage, recomputes=recomputes) for one in self._trainings])

    def _deep(self, steps: list[StepMemory]) -> StepMemory:
        if len(steps) == 1:
            return steps[0]
        # what one more repeat does, operation by operation
        more = Counter(steps[1].work) - Counter(steps[0].work)
        work: list[Work] = list(steps[1].work)
        for operation, count in more.items():
            work += self._more * count * [operation]
        return StepMemory(
            stage=steps[1].stage,
            weights=self._at_full_depth([step.weights for step in steps]),
            gradients=self._at_full_depth([step.gradients for step in steps]),
            optimizer=self._at_full_depth([step.optimizer for step in steps]),
            activations=self._at_full_depth([step.activations for step in steps]),
            peak=self._at_full_depth([step.peak for step in steps]),
            work=tuple(work),
        )

    def _at_full_depth(self, values: list[int]) -> int:
        if len(values) == 1:
            return values[0]
        return values[1] + self._more * (values[1] - values[0])


class StepEstimate(NamedTuple):
    """One optimizer step."""

    tensors: int
    """Bytes of all tensors at the peak."""
    seconds: float


class StepEstimator:
    """Estimates steps of recipes that differ little."""

    def __init__(self, precision: Precision, rates: Rates) -> None:
        self._precision, self._rates = precision, rates
        self._last: Depths | None = None

    def __call__(self, recipe: Recipe) -> StepEstimate:
        """The largest step of a recipe's stages."""
        last = self._last
        depths = last.like(recipe, self._precision) if last else Depths(recipe, self._precision)
        self._last = depths
        step = depths.largest_step()
        return StepEstimate(step.peak, step_seconds(step.work, self._rates))


def _at_depth(recipe: Recipe, repeat: int) -> Recipe:
    core = recipe.model.core.model_copy(update={"repeat": repeat})
    model = recipe.model.model_copy(update={"core": core})
    return recipe.model_copy(update={"model": model})
