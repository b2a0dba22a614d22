"""One sitting of a training: decides where it starts and stops, then lets the Trainer work."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from valkyrie_core.data.dataset import Dataset
from valkyrie_core.data.questions import Question, QuestionStream
from valkyrie_core.data.tokenizer import Tokenizer, load_tokenizer
from valkyrie_core.errors import (
    CheckpointError,
    MissingError,
    RecipeError,
    ResourceError,
    StoppedError,
)
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.canvas_core import CanvasConfig
from valkyrie_core.nn.models import Model, build_model
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.allocator import keep_memory, return_memory
from valkyrie_core.train.checkpoint import step_directory
from valkyrie_core.train.device import STORED, resolve_device, resolve_precision
from valkyrie_core.train.load import check_tokenizer, load_initial_weights
from valkyrie_core.train.progress import StepEvent, Validation
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.sitting import Sitting, begin, go_on, recipe_hash
from valkyrie_core.train.stages import training_batches
from valkyrie_core.train.storage import Storage
from valkyrie_core.train.track import build_tracker
from valkyrie_core.train.trainer import Poll, Tools, Trainer, no_question

log = logging.getLogger("valkyrie")

Evaluate = Callable[[Model, Dataset, Poll], Validation | None]
"""Validates a model, calling poll() at every batch; None where there is no validation text."""
Sample = Callable[[Model, Dataset, str, Poll], str]
"""Continues a prompt, calling poll() at every token, with a generator of its own."""


class TrainResult(NamedTuple):
    """What a sitting came to."""

    run: RunDir
    recipe: Recipe
    """As the run was started, with what this sitting may change."""
    dataset: Dataset
    step: int
    """Optimizer steps done, all sittings together."""
    horizon: int
    """The step at which the run is finished."""
    tokens_seen: int
    """Training tokens, all sittings together."""
    seconds: float
    """Seconds of training, all sittings together, without validations and checkpoints."""
    tokens_per_second: float | None
    """In this sitting, its first step not counted."""
    mfu: float | None
    """In this sitting."""
    train_loss: float | None
    """Mean of the last logged steps, in nats per token."""
    validation: Validation | None
    """The newest validation."""
    best_step: int | None
    best_bpb: float | None
    parameters: int
    device: torch.device
    precision: Precision
    checkpoint: Path
    """The newest checkpoint."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.horizon


def train_run(
    recipe: Recipe,
    *,
    prepare: Callable[[Tokenizer | None], Dataset],
    evaluate: Evaluate,
    sample: Sample,
    resume: bool = False,
    steps: int | None = None,
    extend_steps: int | None = None,
    progress: Callable[[StepEvent], None] = lambda _event: None,
    peak_flops: float | None = None,
    command: str,
    resume_command: str,
    storage: Storage | None = None,
) -> TrainResult:
    """Start, resume or extend the run that `recipe` names, under its lock.

    Args:
        recipe: what to train; on resume it must be the run's own but for harmless keys.
        prepare: gives the packed data; called under the lock, may take long. Its argument is
            the tokenizer that a resumed run brings along, None for a fresh one.
        evaluate: see `Evaluate`.
        sample: see `Sample`.
        resume: go on from the newest valid checkpoint; a finished run is left as it is.
        steps: fresh, the total and the schedule's horizon; on resume, where to stop earlier.
        extend_steps: continue a finished run by so many steps (see `LRPlan`).
        progress: told about every step and validation.
        peak_flops: this machine's measured matmul peak in FLOP per second, for the MFU.
        command: what the user typed; shown to whoever finds the run locked.
        resume_command: what goes on with the run; shown when it is stopped or refused.
        storage: the file operations (tests put faults there).

    Raises:
        UsageError: the run exists and `resume` is not set; or the steps make no sense.
        MissingError: there is no such run to resume, or an extra is not installed.
        CheckpointError: no checkpoint is valid, or it does not belong to this recipe and data.
        DivergedError: loss, gradients or weights stopped being finite.
        ResourceError: memory or disk ran out.
        RunInUseError: another process trains this run.
        StoppedError: a signal came; the state is saved.
    """
    run = RunDir(Path(recipe.runs_dir) / recipe.name, storage)
    goes_on = resume or extend_steps is not None
    if goes_on and not run.recipe_file.exists():
        raise MissingError(
            f"there is no run {run.path} to go on with",
            hint="start it: leave out --resume and --extend-steps",
        )
    run.create()
    try:
        with StopSignal() as stop, run.lock(command):
            if goes_on:
                sitting = go_on(run, recipe, steps=steps, extend_steps=extend_steps)
            else:
                sitting = begin(run, recipe, steps=steps, resume_command=resume_command)
            calls = Calls(prepare, evaluate, sample, progress)
            return _train(run, sitting, calls, stop, peak_flops)
    except StopRequestedError as signal:
        raise _stopped(run, str(signal), command, resume_command) from None
    except OSError as error:
        raise ResourceError(
            f"a file could not be read or written: {error}",
            hint=f"checkpoints are intact; make room, then go on: {resume_command}",
        ) from error


class Calls(NamedTuple):
    """What a sitting calls: see `train_run`."""

    prepare: Callable[[Tokenizer | None], Dataset]
    evaluate: Evaluate
    sample: Sample
    progress: Callable[[StepEvent], None]


def _train(
    run: RunDir, sitting: Sitting, calls: Calls, stop: StopSignal, peak_flops: float | None
) -> TrainResult:
    """Prepare the data, put the trainer where the sitting begins, and let it work."""
    recipe, checkpoint = sitting.recipe, sitting.checkpoint
    tracker = build_tracker(
        recipe.train.track,
        run.path,
        recipe=recipe.model_dump(mode="json"),
        first_step=checkpoint.step + 1 if checkpoint else 1,
    )
    try:
        with stop.immediate():
            own = load_tokenizer(run.tokenizer_directory) if checkpoint else None
            dataset = calls.prepare(own)
        tools = Tools(
            batch=training_batches(dataset, recipe.train, recipe.seed),
            question=_questions(dataset, recipe),
            evaluate=lambda model, poll: calls.evaluate(model, dataset, poll),
            sample=lambda model, prompt, poll: calls.sample(model, dataset, prompt, poll),
            progress=calls.progress,
            tracker=tracker,
        )
        trainer = _trainer(run, sitting, dataset, tools, stop, peak_flops)
        trainer.fit(sitting.until)
    finally:
        if tracker is not None:
            tracker.close()
    return _result(run, sitting, dataset, trainer)


def _trainer(
    run: RunDir,
    sitting: Sitting,
    dataset: Dataset,
    tools: Tools,
    stop: StopSignal,
    peak_flops: float | None,
) -> Trainer:
    """A trainer that stands where the sitting begins: at step 0 or at a checkpoint."""
    recipe = sitting.recipe
    device = resolve_device(recipe.device)
    precision = resolve_precision(recipe.train.precision, device)
    log.info("training on %s in %s, %d threads", device, precision, torch.get_num_threads())
    if device.type == "cpu":
        # where gradients are not even kept, memory matters more than page faults
        keep_memory() if recipe.train.update == "after_backward" else return_memory()
    binding = {
        "run": run.name,
        "recipe_hash": recipe_hash(run.stored_recipe()),
        "tokenizer_fingerprint": dataset.tokenizer.fingerprint,
        "data_fingerprint": dataset.fingerprint,
        "device": device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    seed_everything(recipe.seed)
    model = build_model(recipe.model, STORED[recipe.train.weights]).to(device)
    trainer = Trainer(
        recipe.train,
        model=model,
        run=run,
        plan=sitting.plan,
        tools=tools,
        stop=stop,
        device=device,
        precision=precision,
        peak_flops=peak_flops,
        binding=binding,
    )
    if sitting.checkpoint is None:
        load_initial_weights(model, recipe, dataset.tokenizer)
        dataset.tokenizer.save(run.tokenizer_directory)
        trainer.start()
    else:
        check_tokenizer(sitting.checkpoint, dataset.tokenizer)
        _check_binding(sitting.checkpoint.meta, binding)
        if sitting.plan.extensions:
            # not before all that could refuse the run has agreed
            run.save_extensions(sitting.plan.extensions)
        trainer.restore(sitting.checkpoint)
    run.save_environment({"from_step": trainer.at.step, **binding})
    return trainer


def _questions(dataset: Dataset, recipe: Recipe) -> Callable[[int], Question]:
    """The training questions of a canvas."""
    core = recipe.model.core
    if not isinstance(core, CanvasConfig):
        return no_question
    for prompt in recipe.train.sample_prompts:
        size = len(dataset.tokenizer.encode(prompt))
        if size > core.cells:
            raise RecipeError(
                f"train.sample_prompts: {prompt!r} has {size} tokens, and the canvas {core.cells} "
                "cells",
                hint=f"a shorter one, or model.core.cells: {size}",
            )
    stream = QuestionStream(dataset, weights=dataset.weights, seed=recipe.seed, cells=core.cells)
    return stream.row


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _check_binding(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What must agree is an error where it does not; what changes only the bits is a warning."""
    if stored["recipe_hash"] != now["recipe_hash"]:
        raise CheckpointError(
            "the checkpoint was trained with another recipe than the run's recipe.json",
            hint="put the run's own recipe.json back, or start a new run with --set name=NEW",
        )
    if stored["data_fingerprint"] != now["data_fingerprint"]:
        raise CheckpointError(
            "the texts are not those that the run was trained on: their fingerprint is "
            f"{now['data_fingerprint'][:12]} instead of {stored['data_fingerprint'][:12]}",
            hint="put the texts back as they were, or start a new run with --set name=NEW",
        )
    for key in ("device", "precision", "threads", "torch"):
        if stored[key] != now[key]:
            log.warning(
                "%s was %s and is %s: the run goes on, but not bit for bit as it would have",
                key,
                stored[key],
                now[key],
            )


def _stopped(run: RunDir, signal: str, command: str, resume_command: str) -> StoppedError:
    if not run.has_checkpoints():
        return StoppedError(
            f"stopped by {signal} before the first step; nothing is lost", hint=command
        )
    return StoppedError(f"stopped by {signal}; the run {run.name} is saved", hint=resume_command)


def _result(run: RunDir, sitting: Sitting, dataset: Dataset, trainer: Trainer) -> TrainResult:
    at, meter = trainer.at, trainer.meter
    train_row, row = trainer.journal.last("train"), trainer.journal.last("val")
    return TrainResult(
        run=run,
        recipe=sitting.recipe,
        dataset=dataset,
        step=at.step,
        horizon=sitting.plan.horizon,
        tokens_seen=at.tokens_seen,
        seconds=at.seconds,
        tokens_per_second=meter.sitting_tokens_per_second,
        mfu=meter.sitting_mfu,
        train_loss=train_row["loss"] if train_row else at.loss,
        validation=Validation(row["bpb"], row["bpb_by_corpus"]) if row else None,
        best_step=at.best_step,
        best_bpb=at.best_bpb,
        parameters=trainer.model.num_parameters(),
        device=trainer.device,
        precision=trainer.precision,
        checkpoint=step_directory(run.checkpoints, at.step),
    )
