"""Before a training starts: whether it fits this machine, and what it becomes where it does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from valkyrie_core.plan.depth import StepEstimator
from valkyrie_core.plan.recipe_plan import Here, process_peak
from valkyrie_core.recipe import Recipe
from valkyrie_core.runs.planning import examine
from valkyrie_core.train import fitting
from valkyrie_core.train.config import FitConfig, SupervisedConfig
from valkyrie_core.train.fitting import Fitted, StepCost, as_fitted, tokens_per_step
from valkyrie_core.train.run_dir import RunDir

log = logging.getLogger("valkyrie")

DAY = 86_400.0
YEAR = 365.25 * DAY


def fitted(recipe: Recipe, *, goes_on: bool, steps: int | None = None) -> Recipe:
    """The recipe as it is trained here: itself, unless it names `train.fit` and does not fit.

    Args:
        goes_on: whether a run that has begun goes on: it stays what it became.
        steps: of the whole run; None: as the recipe says.

    Raises:
        ResourceError: the smallest training does not fit either.
    """
    if recipe.train.fit is None:
        return recipe
    if not goes_on:
        recipe = _unfitted(recipe, recipe.train.fit)
    run = RunDir(Path(recipe.runs_dir) / recipe.name)
    if goes_on and run.recipe_file.exists():
        train = as_fitted(run.load_recipe().train, recipe.train)
        if train != recipe.train:
            keys = ", ".join(f"train.{key}" for key in train.fit.changed) if train.fit else ""
            log.info("the run was fitted to a machine when it began, and keeps its %s", keys)
        return recipe.model_copy(update={"train": train})
    if goes_on or run.has_checkpoints():
        return recipe  # training says what is wrong
    log.info("tracing a step without data: does it fit?")
    here = examine(recipe, lambda _what: None)
    if here.memory is None:
        log.warning("how much memory is free can't be told here: the recipe stays as it is")
        return recipe
    estimate = StepEstimator(here.precision, here.rates)

    def cost(train: SupervisedConfig) -> StepCost:
        step = estimate(recipe.model_copy(update={"train": train}))
        return StepCost(process_peak(step.tensors, here) or step.tensors, step.seconds)

    written = cost(recipe.train)
    found = fitting.fit(recipe.train, cost, here.memory)
    if found.changes:
        _tell(recipe, written, found, here, steps or recipe.train.steps)
    assert recipe.train.fit is not None
    limit = recipe.train.fit.step_seconds
    if found.cost.seconds > limit:
        log.warning(
            "a step takes about %s, longer than train.fit.step_seconds (%s): it can't be made of "
            "fewer tokens",
            duration(found.cost.seconds),
            duration(limit),
        )
    return recipe.model_copy(update={"train": found.train})


def _unfitted(recipe: Recipe, fit: FitConfig) -> Recipe:
    """Without what a run was fitted to, if this is the recipe of one."""
    train = recipe.train.model_copy(update={"fit": fit.model_copy(update={"changed": ()})})
    return recipe.model_copy(update={"train": train})


def _tell(recipe: Recipe, written: StepCost, found: Fitted, here: Here, steps: int) -> None:
    """All that was changed, and what a whole run takes."""
    assert here.memory is not None
    assert recipe.train.fit is not None
    log.warning(
        "%s does not fit this machine as it is written: a step would take %s (%s are free) and %s "
        "(train.fit.step_seconds allows %s). It is trained with:",
        recipe.name,
        _gibibytes(written.peak_bytes),
        _gibibytes(here.memory),
        duration(written.seconds),
        duration(recipe.train.fit.step_seconds),
    )
    for change in found.changes:
        log.warning("  train.%s: %s -> %s", change.key, _plain(change.before), _plain(change.after))
    as_written = tokens_per_step(recipe.train)
    log.warning(
        "a step of %s tokens takes about %s and %s. All %s steps would take %s; as written "
        "(%s tokens a step) they would take %s here",
        f"{tokens_per_step(found.train):,}",
        duration(found.cost.seconds),
        _gibibytes(found.cost.peak_bytes),
        f"{steps:,}",
        duration(steps * found.cost.seconds),
        f"{as_written:,}",
        duration(steps * written.seconds),
    )


def duration(seconds: float) -> str:
    """A rough length of time: 41 s, 12 min, 3.5 h, 140 days, 1,023 years."""
    for limit, unit, size in (
        (120.0, "s", 1.0),
        (7200.0, "min", 60.0),
        (2 * DAY, "h", 3600.0),
        (2 * YEAR, "days", DAY),
    ):
        if seconds < limit:
            count = seconds / size
            return f"{count:.2g} {unit}" if count < 10 else f"{count:,.0f} {unit}"
    return f"{seconds / YEAR:,.0f} years"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _plain(value: Any) -> str:
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
        return str(value["type"]) if "type" in value else json.dumps(value)
    if isinstance(value, tuple):
        return json.dumps([item.model_dump(mode="json") for item in value])
    return json.dumps(value)
