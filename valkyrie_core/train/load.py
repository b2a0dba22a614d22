"""From a run's directory to a model that can be used, or to weights another run starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from valkyrie_core.data.tokenizer import Tokenizer, load_tokenizer
from valkyrie_core.errors import CheckpointError, MissingError, RecipeError, UsageError
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.models import Model, model_class
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.checkpoint import (
    Checkpoint,
    list_checkpoints,
    newest_valid,
    step_directory,
    verify,
)
from valkyrie_core.train.device import STORED, resolve_device
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.weights import load_model_tensors

log = logging.getLogger("valkyrie")

Which = Literal["best", "newest"]


class LoadedRun(NamedTuple):
    """A trained model with all that is needed to use it."""

    model: Model
    tokenizer: Tokenizer
    recipe: Recipe
    checkpoint: Checkpoint
    """Where the weights come from."""


class LoadedLM(NamedTuple):
    """A trained language model: see `LoadedRun`."""

    model: HybridLM
    tokenizer: Tokenizer
    recipe: Recipe
    checkpoint: Checkpoint


def find_checkpoint(run: RunDir, which: Which = "best") -> Checkpoint:
    """The verified checkpoint of a run; `best` is the one with the best validation.

    Falling back to another one is announced. Raises MissingError where the run has none,
    CheckpointError where none is valid.
    """
    newest = newest_valid(run.checkpoints).checkpoint
    if newest is None:
        raise MissingError(
            f"the run {run.path} has no checkpoint yet",
            hint="its training ended before the first step; train it again",
        )
    best_step = newest.meta["position"]["best_step"]
    if which == "newest" or best_step is None or best_step == newest.step:
        return newest
    try:
        return verify(step_directory(run.checkpoints, best_step))
    except CheckpointError as error:
        log.warning("the best checkpoint can't be used: %s", error)
        log.warning("using the newest instead, %s", newest.path)
        return newest


def checkpoint_of_step(run: RunDir, step: int) -> Checkpoint:
    """The verified checkpoint of one step.

    Raises MissingError where the run has none of that step, CheckpointError where it is damaged.
    """
    found = [at for at, _ in list_checkpoints(run.checkpoints)]
    if step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise MissingError(
            f"the run {run.path} has no checkpoint of step {step}", hint=f"there is: {there}"
        )
    return verify(step_directory(run.checkpoints, step))


def load_run(
    path: Path,
    *,
    which: Which = "best",
    step: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None,
) -> LoadedRun:
    """The model of a run, ready to evaluate; `device` None takes the recipe's.

    Args:
        step: of the checkpoint; None: the one that `which` says.

    Raises:
        MissingError: this is no run, or it has no tokenizer or no (such) checkpoint.
        CheckpointError: no checkpoint is valid, or it belongs to another tokenizer.
    """
    run = RunDir(path)
    recipe = run.load_recipe()
    checkpoint = find_checkpoint(run, which) if step is None else checkpoint_of_step(run, step)
    tokenizer = load_tokenizer(run.tokenizer_directory)
    check_tokenizer(checkpoint, tokenizer)
    where = resolve_device(device or recipe.device)
    model = model_class(recipe.model).unfilled(recipe.model, where, STORED[recipe.train.weights])
    load_model_tensors(model, checkpoint.model_tensors(), str(checkpoint.path))
    model.eval()
    return LoadedRun(model, tokenizer, recipe, checkpoint)


def load_language_model(
    path: Path,
    *,
    which: Which = "best",
    step: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None,
) -> LoadedLM:
    """As `load_run`; UsageError where the run's model answers questions on a canvas."""
    return language_model(load_run(path, which=which, step=step, device=device))


def language_model(loaded: LoadedRun) -> LoadedLM:
    """The same; UsageError where it is a canvas."""
    if not isinstance(loaded.model, HybridLM):
        raise UsageError(
            "the run's model is an answer canvas: it answers questions, and reads no text",
            hint="valkyrie eval asks it, and valkyrie generate --prompt QUESTION",
        )
    return LoadedLM(loaded.model, *loaded[1:])


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError where weights and tokenizer do not belong together."""
    bound: Mapping[str, Any] = checkpoint.meta
    if bound["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise CheckpointError(
            f"{checkpoint.path} was trained with another tokenizer "
            f"({bound['tokenizer_fingerprint'][:12]}, this one is {tokenizer.fingerprint[:12]})",
            hint="put the run's own tokenizer back, or train a new run with --set name=NEW",
        )


def load_initial_weights(model: Model, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Give a fresh model the weights of the run that `train.init_from` names, and only those.

    Raises MissingError where there is no such run, RecipeError where it does not fit.
    """
    source = recipe.train.init_from
    if source is None:
        return
    candidates = (Path(source), Path(recipe.runs_dir) / source)
    path = next((path for path in candidates if RunDir(path).checkpoints.is_dir()), None)
    if path is None:
        raise MissingError(
            f"train.init_from names {source!r}, and there is no such run",
            hint=f"give a directory, or a name in {recipe.runs_dir}",
        )
    checkpoint = find_checkpoint(RunDir(path))
    try:
        check_tokenizer(checkpoint, tokenizer)
        load_model_tensors(model, checkpoint.model_tensors(), str(checkpoint.path), rounds=True)
    except CheckpointError as error:
        raise RecipeError(
            f"train.init_from: {error.message}",
            hint="model and tokenizer must be those of the run that is started from",
        ) from error
    log.info("weights of %s, step %d, are the start", path, checkpoint.step)
