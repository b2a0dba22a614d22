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
from valkyrie_core.nn.block import StackConfig
from valkyrie_core.plan.seconds import Rates, step_seconds
from valkyrie_core.plan.trace import StepMemory, Training, Work
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.stages import Stage, stages

SHALLOW = (2, 3)
"""Repeats of the pattern that are traced."""
DEEP = 5
"""From so many repeats on, the model is not traced whole."""


class Depths:
    """A training, traced whole or at two smaller depths; see `Training`."""

    def __init__(self, recipe: Recipe, precision: Precision) -> None:
        """Builds one or two models without data."""
        repeat = _repeat(recipe)
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

    def steps(self) -> list[StepMemory]:
        """One step of every stage of the recipe."""
        return [self.step(stage) for stage in stages(self.recipe.train)]

    def step(self, stage: Stage, *, recomputes: bool | None = None) -> StepMemory:
        """One whole step of a stage."""
        return self._deep([one.step(stage, recomputes=recomputes) for one in self._trainings])

    def _deep(self, steps: list[StepMemory]) -> StepMemory:
        if len(steps) == 1:
            return steps[0]
        return StepMemory(
            stage=steps[1].stage,
            weights=self._at_full_depth([step.weights for step in steps]),
            gradients=self._at_full_depth([step.gradients for step in steps]),
            optimizer=self._at_full_depth([step.optimizer for step in steps]),
            activations=self._at_full_depth([step.activations for step in steps]),
            peak=self._at_full_depth([step.peak for step in steps]),
            work=self._work(steps[0].work, steps[1].work),
        )

    def _work(self, less: tuple[Work, ...], more: tuple[Work, ...]) -> tuple[Work, ...]:
        """The operations at full depth: those that another repeat adds, once for each; and those
        that grow with depth (an update of all weights at once), grown."""
        before, after = Counter(less), Counter(more)
        added = list((after - before).elements())
        grown = []
        for old in (before - after).elements():
            larger = [x for x in added if x.flops >= old.flops and x.moved >= old.moved]
            if larger:
                new = min(larger, key=lambda x: (x.flops - old.flops, x.moved - old.moved))
                added.remove(new)
                after[new] -= 1
                flops = new.flops + self._more * (new.flops - old.flops)
                grown.append(Work(flops, new.moved + self._more * (new.moved - old.moved)))
        return (*after.elements(), *(self._more * added), *grown)

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
        """The largest step of a recipe's stages, and the slowest one's seconds."""
        last = self._last
        depths = last.like(recipe, self._precision) if last else Depths(recipe, self._precision)
        self._last = depths
        steps = depths.steps()
        return StepEstimate(
            max(step.peak for step in steps),
            max(step_seconds(step.work, self._rates) for step in steps),
        )


def _repeat(recipe: Recipe) -> int:
    """How often the pattern is laid; loops are traced whole."""
    core = recipe.model.core
    return core.repeat if isinstance(core, StackConfig) else 1


def _at_depth(recipe: Recipe, repeat: int) -> Recipe:
    if repeat == _repeat(recipe):
        return recipe
    core = recipe.model.core.model_copy(update={"repeat": repeat})
    model = recipe.model.model_copy(update={"core": core})
    return recipe.model_copy(update={"model": model})
