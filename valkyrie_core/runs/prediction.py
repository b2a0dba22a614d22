"""Predicted against measured: after the first steps of a training, one line says both."""

from __future__ import annotations

import logging
from collections.abc import Callable

from valkyrie_core.machine.memory import peak_memory
from valkyrie_core.plan.depth import Depths
from valkyrie_core.plan.recipe_plan import process_peak
from valkyrie_core.plan.seconds import step_seconds
from valkyrie_core.recipe import Recipe
from valkyrie_core.report.training import StepCost
from valkyrie_core.runs.planning import examine
from valkyrie_core.train.progress import StepEvent
from valkyrie_core.train.stages import stage_at, stages

log = logging.getLogger("valkyrie")

TOLD_AT = 3
"""The step of a sitting after which it is told; the first one warms up."""
WORTH_SECONDS = 20.0
"""A training that is shorter altogether is not kept waiting for a prediction."""


class Prediction:
    """Hands the events of a training on, and compares it with its plan after the first steps."""

    def __init__(self, recipe: Recipe, progress: Callable[[StepEvent], None]) -> None:
        self.predicted: StepCost | None = None
        """None until it was made."""
        self._recipe, self._progress = recipe, progress
        self._steps = 0

    def __call__(self, event: StepEvent) -> None:
        """One event of the training."""
        self._progress(event)
        if event.validation is not None:
            return
        self._steps += 1
        if self._steps != TOLD_AT:
            return
        now = measured(self._recipe, event.tokens_per_second)
        if now.seconds_per_step is None:
            return
        if TOLD_AT * now.seconds_per_step + (event.eta_seconds or 0.0) >= WORTH_SECONDS:
            self.predicted = predict(self._recipe, event.step - 1)
            _tell(self.predicted, now)


def predict(recipe: Recipe, step: int) -> StepCost:
    """What the plan says of a step (from 0); the process's own memory only where it was measured
    before, by `valkyrie plan`: that takes ten seconds."""
    here = examine(recipe, measure_held=False)
    stage = stage_at(step, stages(recipe.train))
    taken = Depths(recipe, here.precision).step(stage)
    return StepCost(
        seconds_per_step=step_seconds(taken.work, here.rates),
        peak_bytes=process_peak(taken.peak, here),
    )


def measured(recipe: Recipe, tokens_per_second: float | None) -> StepCost:
    """What this process did so far."""
    tokens = recipe.train.batch_size * recipe.train.context_len
    seconds = tokens / tokens_per_second if tokens_per_second else None
    return StepCost(seconds_per_step=seconds, peak_bytes=peak_memory())


def _tell(predicted: StepCost, now: StepCost) -> None:
    def gibibytes(size: int | None) -> str:
        return "?" if size is None else f"{size / 2**30:.2f} GiB"

    log.info(
        "predicted: %.3g s a step, %s at the peak; measured so far: %.3g s, %s",
        predicted.seconds_per_step,
        gibibytes(predicted.peak_bytes),
        now.seconds_per_step,
        gibibytes(now.peak_bytes),
    )
