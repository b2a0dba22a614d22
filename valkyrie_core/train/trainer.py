"""Supervised training: one loop, readable top to bottom.

What happens at a step is a pure function of the state at its beginning: the batch comes from
(seed, step), the learning rate from (plan, step), validation and samples from the weights. All
else that matters, carried states included, is in the checkpoint; that is why a run that was
stopped anywhere and resumed gives the same bits as one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from valkyrie_core.data.batch import Batch
from valkyrie_core.data.questions import Question
from valkyrie_core.errors import DivergedError, ResourceError
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.models import Model
from valkyrie_core.train.after_backward import StepAfterBackward
from valkyrie_core.train.average import Average
from valkyrie_core.train.checkpoint import Checkpoint
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.device import autocast
from valkyrie_core.train.in_backward import StepInBackward
from valkyrie_core.train.journal import Journal
from valkyrie_core.train.objective import Running
from valkyrie_core.train.objectives import build_objective
from valkyrie_core.train.optim import build_optimizers
from valkyrie_core.train.progress import Meter, Position, StepEvent, Validation
from valkyrie_core.train.rng import RngState
from valkyrie_core.train.routing import Routing
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.saver import Saver
from valkyrie_core.train.schedule import LRPlan
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.track import Tracker
from valkyrie_core.train.weights import non_finite

log = logging.getLogger("valkyrie")

Poll = Callable[[], None]
"""Called often by what takes long; raises where a signal asks to stop."""
Evaluate = Callable[[Model, Poll], Validation | None]
"""Validates a model; None where there is no validation text."""
Sample = Callable[[Model, str, Poll], str]
"""Continues a prompt, from a generator of its own."""


def no_question(number: int) -> Question:
    """For what reads text."""
    raise LookupError(f"there is no question {number}")


class Tools(NamedTuple):
    """What a trainer is given to call."""

    batch: Callable[[int], Batch]
    """The training batch of a step: a pure function."""
    evaluate: Evaluate
    sample: Sample
    progress: Callable[[StepEvent], None]
    """Told about every step."""
    tracker: Tracker | None = None
    question: Callable[[int], Question] = no_question
    """A training question by its number: a pure function; a canvas asks for it."""


class Trainer:
    """Trains one model in one run directory, whose lock the caller holds."""

    def __init__(
        self,
        config: SupervisedConfig,
        *,
        model: Model,
        run: RunDir,
        plan: LRPlan,
        tools: Tools,
        stop: StopSignal,
        device: torch.device,
        precision: Precision,
        peak_flops: float | None = None,
        binding: Mapping[str, Any] | None = None,
    ) -> None:
        """`binding` goes into every checkpoint: fingerprints and what else must agree later."""
        self.config = config
        self.model = model
        self.plan = plan
        self.tools = tools
        self.stop = stop
        self.device = device
        self.precision = precision
        self.optimizers = build_optimizers(config.optimizer, model)
        self.routing = Routing(model, self.optimizers)
        self.average = None if config.ema is None else Average(model, config.ema.decay)
        self.saver = Saver(
            run,
            model=model,
            average=self.average,
            optimizers=self.optimizers,
            extensions=plan.extensions,
            keep_last=config.keep_last,
            binding=binding or {},
        )
        self.journal = Journal(run, tools.tracker)
        self.at = Position()
        self.meter = Meter(peak_flops=peak_flops)
        self._eval_every = config.eval_steps
        self._save_every = config.save_steps
        model.core.recomputes = config.activation_checkpointing
        clip = config.clip_grad_norm
        self._update: StepAfterBackward | StepInBackward
        if config.update == "in_backward":
            self._update = StepInBackward(model, self.optimizers, clip, self._lost)
        else:
            self._update = StepAfterBackward(model, self.optimizers, clip, self._diverged)
        self.objective = build_objective(
            config,
            model,
            tools.batch,
            tools.question,
            self.routing,
            Running(precision, device, stop.poll, self._diverged),
        )

    def start(self) -> None:
        """Save step 0 and go on from what was read back: a run that can't resume never begins."""
        self.journal.start(0, 0)
        if self.average is not None:
            self.average.restart()
        self._write_checkpoint()
        self.restore(self.saver.read_back(0))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint stood."""
        self.at, tensors = self.saver.restore(checkpoint)
        self.objective.restore(self.at.step, tensors)
        self.journal.start(self.at.step, self.at.validated)

    def fit(self, until: int) -> None:
        """Train from where the trainer stands to step `until`.

        Raises:
            StopRequestedError: a signal came; the state has been saved.
            DivergedError: loss or gradients are not finite; nothing was updated with them.
            ResourceError: memory ran out, or a checkpoint can't be written.
        """
        try:
            while True:
                if self._validation_is_due():
                    self._validate()
                if self._save_is_due(until):
                    self._save()
                if self.at.step >= until:
                    break
                self._train_step()
                if self.at.step % self.config.log_every == 0 or self.at.step in self.plan.ends:
                    rates = self.optimizers.learning_rates()
                    self.journal.train(
                        self.at, self.meter, rates, self.routing, self.objective.metrics()
                    )
        except StopRequestedError:
            self._save()
            self.journal.draw()
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _out_of_memory(self.config) from error
        except RuntimeError as error:
            # torch's processor allocator has no exception class of its own
            if "can't allocate memory" in str(error):
                raise _out_of_memory(self.config) from error
            raise
        self.journal.draw()

    def _train_step(self) -> None:
        """One optimizer step, or none at all: a stop or a NaN leaves everything as it was.

        Updates inside the backward pass are the exception: a NaN there ends the run.
        """
        started = time.perf_counter()
        step = self.at.step
        rng = RngState.capture()
        scale = self.plan.scale(step)
        self.optimizers.set_lr_scale(scale)
        # of the recipe's steps: what has grown hard stays so where training is extended
        self.routing.restart(step / self.config.steps)
        try:
            work = self.objective.gradients(step)
            grad_norm = self._update.finish(work.loss)
        except BaseException:
            self.optimizers.zero_grad()
            rng.restore()
            raise
        if self.average is not None:
            self.average.update(step)
        self._feed_back(scale)
        self.objective.settle(step)
        seconds = time.perf_counter() - started
        self.at.advance(work.loss, work.num_scored, work.num_tokens, grad_norm, scale, seconds)
        self.meter.add(work.num_tokens, work.flops, seconds)
        self._report()

    def _lost(self, what: str) -> DivergedError:
        return self._diverged(
            what,
            "the backward pass had updated others before it; what was trained since the last "
            "checkpoint is lost",
        )

    def _feed_back(self, scale: float) -> None:
        for revival in self.routing.finish(scale):
            self.at.revived.append(list(revival))
            log.info(
                "step %d: expert %d of layer %d had no work: it is a copy of expert %d now",
                self.at.step + 1,
                revival.expert,
                revival.layer,
                revival.source,
            )

    def _diverged(self, what: str, then: str = "nothing was updated with it") -> DivergedError:
        saved = self.saver.saved[0] if self.saver.saved else 0
        return DivergedError(
            f"training diverged after step {self.at.step}: {what}; {then}, "
            f"and the checkpoint of step {saved} is intact",
            hint="try a lower rate, --set train.optimizer.lr=..., under a new name, --set name=...",
        )

    def _validation_is_due(self) -> bool:
        step = self.at.step
        if step == 0 or step == self.at.validated:
            return False
        return step % self._eval_every == 0 or step in self.plan.ends

    def _validate(self) -> None:
        """Validate and sample, then write the rows: a stop in between leaves no half of it."""
        step = self.at.step
        with self._undisturbed():
            validation = self.tools.evaluate(self.model, self.stop.poll)
            samples = [
                (prompt, self.tools.sample(self.model, prompt, self.stop.poll))
                for prompt in self.config.sample_prompts
            ]
        if validation is not None:
            if not math.isfinite(validation.bpb):
                raise self._diverged(f"the validation is {validation.bpb} bits per byte")
            if self.at.best_bpb is None or validation.bpb < self.at.best_bpb:
                self.at.best_bpb, self.at.best_step = validation.bpb, step
        self.journal.validation(step, validation, samples)
        self.at.validated = step
        if validation is not None:
            self._report(validation)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Whatever runs inside draws no number that training would have drawn."""
        rng = RngState.capture()
        self.model.eval()
        averaged = nullcontext() if self.average is None else self.average.applied()
        try:
            with torch.no_grad(), autocast(self.precision, self.device), averaged:
                yield
        finally:
            self.model.train()
            rng.restore()

    def _save_is_due(self, until: int) -> bool:
        step = self.at.step
        # a stop during validation saved this step without it: then it is due again
        if self.saver.saved == (step, self.at.validated):
            return False
        due = step % self._save_every == 0 or step in self.plan.ends
        return due or step in (until, self.at.best_step)

    def _save(self) -> None:
        if self.saver.saved == (self.at.step, self.at.validated):
            return
        broken = non_finite(dict(self.model.named_parameters()))
        if broken:
            # the next loss would show it, but by then it would lie in an intact checkpoint
            raise self._diverged(f"the weights {broken[0]} are not finite")
        self.journal.sync()
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self.saver.save(self.at, self.objective.to_tensors())

    def _report(self, validation: Validation | None = None) -> None:
        self.tools.progress(
            StepEvent(
                step=self.at.step,
                steps=self.plan.horizon,
                loss=self.at.loss,
                lr=next(iter(self.optimizers.learning_rates().values())),
                tokens_per_second=self.meter.tokens_per_second,
                eta_seconds=self.meter.seconds_for(self.plan.horizon - self.at.step),
                mfu=self.meter.mfu,
                validation=validation,
                experts=self.routing.health(),
                thought=self.objective.thought,
            )
        )


def _out_of_memory(config: SupervisedConfig) -> ResourceError:
    ways = []
    smaller = 2 * config.grad_accum_steps
    if config.update == "after_backward" and config.batch_size % smaller == 0:
        ways.append(f"--set train.grad_accum_steps={smaller}")
    if not config.activation_checkpointing:
        ways.append("--set train.activation_checkpointing=true")
    ways.append("a smaller train.context_len")
    return ResourceError(
        "memory ran out while training",
        hint=f"under a new name: {' or '.join(ways)}; `valkyrie plan` says what fits",
    )
