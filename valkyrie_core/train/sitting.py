"""Where a sitting starts and where it ends: fresh, resumed or extended."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from valkyrie_core.errors import CheckpointError, UsageError, ValkyrieError
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.checkpoint import (
    Checkpoint,
    list_checkpoints,
    newest_valid,
    remove_leftovers,
    set_aside,
)
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.schedule import Extension, LRPlan

log = logging.getLogger("valkyrie")

CHANGEABLE = frozenset(
    {
        "description",
        "device",
        "runs_dir",
        "train.activation_checkpointing",
        "train.compile",
        "train.init_from",
        "train.keep_last",
        "train.log_every",
        "train.precision",
        "train.sample_prompts",
        "train.save_every",
        "train.track",
    }
)
"""Keys that may differ when a run is resumed: they change neither what is learned nor its order."""


class Sitting(NamedTuple):
    """One process's share of a run."""

    recipe: Recipe
    plan: LRPlan
    until: int
    """The step to stop at."""
    checkpoint: Checkpoint | None
    """Where to go on; None starts at step 0."""


def begin(run: RunDir, recipe: Recipe, *, steps: int | None, resume_command: str) -> Sitting:
    """A fresh run. UsageError where one of this name has been trained already."""
    existing = list_checkpoints(run.checkpoints)
    if existing:
        raise _exists(run, existing[0][0], resume_command)
    if steps is not None:
        train = recipe.train.model_copy(update={"steps": steps})
        recipe = recipe.model_copy(update={"train": train})
    _tidy(run)
    run.extensions_file.unlink(missing_ok=True)
    run.save_recipe(recipe)
    plan = LRPlan(recipe.train.schedule, recipe.train.steps)
    return Sitting(recipe, plan, plan.horizon, None)


def _exists(run: RunDir, step: int, resume_command: str) -> UsageError:
    """Says how far a run is and what to type."""
    another = "start another with --set name=NEW"
    try:
        train = run.load_recipe().train
        horizon = LRPlan(train.schedule, train.steps, run.load_extensions()).horizon
    except ValkyrieError:
        # its recipe can't be read; --resume will say so, and more
        return UsageError(
            f"the run {run.name} exists already in {run.path}",
            hint=f"go on with it: {resume_command}; or {another}",
        )
    if step >= horizon:
        return UsageError(
            f"the run {run.name} exists already in {run.path}, finished at step {step}",
            hint=f"continue it with --extend-steps N, or {another}",
        )
    return UsageError(
        f"the run {run.name} exists already in {run.path}, at step {step} of {horizon}",
        hint=f"go on with it: {resume_command}; or {another}",
    )


def _tidy(run: RunDir) -> None:
    remove_leftovers(run.path, run.storage)
    remove_leftovers(run.checkpoints, run.storage)


def go_on(run: RunDir, recipe: Recipe, *, steps: int | None, extend_steps: int | None) -> Sitting:
    """Resume a run from its newest valid checkpoint, or extend a finished one.

    Raises UsageError where the recipe has changed or the steps make no sense, CheckpointError
    where there are checkpoints and none is valid.
    """
    recipe = _agreed(run.load_recipe(), recipe)
    _tidy(run)
    checkpoint, damaged = newest_valid(run.checkpoints)
    extensions: tuple[Extension, ...] = ()
    if checkpoint is None:
        log.warning("the run %s was interrupted before its first step: it starts now", run.name)
    else:
        set_aside(damaged, run.storage)
        extensions = _extensions(run, checkpoint)
    plan = LRPlan(recipe.train.schedule, recipe.train.steps, extensions)
    step = checkpoint.step if checkpoint else 0
    if extend_steps is None:
        until = _until(plan, step, steps)
    else:
        plan = _extended(run, plan, step, extend_steps)
        until = _until(plan, step, steps)
        log.warning("extended: %s", plan.describe_extension())
    if step >= plan.horizon:
        log.warning(
            "the run %s is finished at step %d; --extend-steps N continues it", run.name, step
        )
    return Sitting(recipe, plan, until, checkpoint)


def _extended(run: RunDir, plan: LRPlan, step: int, extend_steps: int) -> LRPlan:
    """The plan of a finished run with another extension."""
    if step < plan.horizon:
        raise UsageError(
            f"the run {run.name} is not finished: it is at step {step} of {plan.horizon}",
            hint="finish it with --resume, then extend it",
        )
    extension = Extension(plan.horizon, extend_steps)
    return LRPlan(plan.schedule, plan.steps, (*plan.extensions, extension))


def _until(plan: LRPlan, step: int, steps: int | None) -> int:
    if steps is None:
        return plan.horizon
    if steps > plan.horizon:
        raise UsageError(
            f"--steps {steps} is beyond the run's horizon of {plan.horizon}: on --resume it can "
            "only stop earlier",
            hint=f"finish the run, then continue it with --extend-steps {steps - plan.horizon}",
        )
    if steps < step:
        raise UsageError(f"--steps {steps} lies in the past: the run is at step {step}")
    return steps


def _extensions(run: RunDir, checkpoint: Checkpoint) -> tuple[Extension, ...]:
    """What was added to the run: by its own list, which must go on where the checkpoint's ends."""
    known = tuple(Extension(**entry) for entry in checkpoint.meta["extensions"])
    listed = run.load_extensions()
    if listed[: len(known)] == known:
        return listed
    if known[: len(listed)] == listed:
        log.warning("%s was incomplete and is restored", run.extensions_file)
        run.save_extensions(known)
        return known
    raise CheckpointError(
        f"{run.extensions_file} contradicts the checkpoint of step {checkpoint.step}",
        hint="delete that file: the checkpoint knows what was added",
    )


def _agreed(stored: Recipe, given: Recipe) -> Recipe:
    """The recipe to go on with: the stored one, with what may change taken from the given one."""
    before, now = dict(_leaves(stored)), dict(_leaves(given))
    keys = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key) and key != "train.steps"
    ]
    # where a type changed, its keys are others anyway: the type says it all
    types = [key.removesuffix("type") for key in keys if key.endswith(".type")]
    changed = [
        f"{key} was {json.dumps(before.get(key))} and is {json.dumps(now.get(key))}"
        for key in keys
        if not any(key.startswith(kind) and key != kind + "type" for kind in types)
    ]
    if changed:
        raise UsageError(
            "the recipe is not the one the run was started with: " + "; ".join(changed[:5]),
            hint="put it back as it was, or start a new run with --set name=NEW",
        )
    horizon = stored.train.steps
    if given.train.steps != horizon:
        log.warning(
            "the run was started with %d steps, and its schedule keeps them (the recipe says %d)",
            horizon,
            given.train.steps,
        )
    return given.model_copy(update={"train": given.train.model_copy(update={"steps": horizon})})


def recipe_hash(stored: Mapping[str, Any]) -> str:
    """Identifies what is learned and how: everything but the keys that may change.

    Args:
        stored: a run's recipe.json as it stands. A recipe that is read and written again would
            gain the keys that later versions have, and its checkpoints would not be its own.
    """
    fixed = {key: value for key, value in _flat(stored) if not _may_change(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in CHANGEABLE)


def _leaves(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a recipe."""
    return _flat(recipe.model_dump(mode="json"))


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    def walk(prefix: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, item in value.items():
            if isinstance(item, dict):
                yield from walk(f"{prefix}{key}.", item)
            else:
                yield f"{prefix}{key}", item

    return walk("", tree)
