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
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from valkyrie_core.data.batch import Batch
from valkyrie_core.errors import DivergedError, ResourceError
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.state import LMState
from valkyrie_core.train import carry
from valkyrie_core.train.after_backward import StepAfterBackward
from valkyrie_core.train.checkpoint import Checkpoint
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.device import autocast
from valkyrie_core.train.in_backward import StepInBackward
from valkyrie_core.train.journal import Journal
from valkyrie_core.train.optim import build_optimizers
from valkyrie_core.train.progress import Meter, Position, StepEvent, Validation
from valkyrie_core.train.rng import RngState
from valkyrie_core.train.routing import Routing
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.saver import Saver
from valkyrie_core.train.schedule import LRPlan
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.stages import Stage, stage_at, stages
from valkyrie_core.train.track import Tracker
from valkyrie_core.train.weights import non_finite

log = logging.getLogger("valkyrie")

Poll = Callable[[], None]
"""Called often by what takes long; raises where a signal asks to stop."""
Evaluate = Callable[[HybridLM, Poll], Validation | None]
"""Validates a model; None where there is no validation text."""
Sample = Callable[[HybridLM, str, Poll], str]
"""Continues a prompt, from a generator of its own."""


class Tools(NamedTuple):
    """What a trainer is given to call."""

    batch: Callable[[int], Batch]
    """The training batch of a step: a pure function."""
    evaluate: Evaluate
    sample: Sample
    progress: Callable[[StepEvent], None]
    """Told about every step."""
    tracker: Tracker | None = None


class Trainer:
    """Trains one model in one run directory, whose lock the caller holds."""

    def __init__(
        self,
        config: SupervisedConfig,
        *,
        model: HybridLM,
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
        self.saver = Saver(
            run,
            model=model,
            optimizers=self.optimizers,
            extensions=plan.extensions,
            keep_last=config.keep_last,
            binding=binding or {},
        )
        self.journal = Journal(run, tools.tracker)
        self.at = Position()
        self.meter = Meter(peak_flops=peak_flops)
        self._stages = stages(config)
        self._states: tuple[LMState, ...] | None = None
        """Of each micro-batch, to go on from; None: the next step starts without."""
        self._eval_every = config.eval_steps
        self._save_every = config.save_steps
        model.core.recomputes = config.activation_checkpointing
        clip = config.clip_grad_norm
        self._update: StepAfterBackward | StepInBackward
        if config.update == "in_backward":
            self._update = StepInBackward(model, self.optimizers, clip, self._lost)
        else:
            self._update = StepAfterBackward(model, self.optimizers, clip, self._diverged)
        self._loss = model.loss
        if config.compile is not None:
            log.info("the model is compiled: its first step takes up to a minute")
            self._loss = model.compiled_loss(config.compile.mode)

    def start(self) -> None:
        """Save step 0 and go on from what was read back: a run that can't resume never begins."""
        self.journal.start(0, 0)
        self._write_checkpoint()
        self.restore(self.saver.read_back(0))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint stood."""
        self.at, tensors = self.saver.restore(checkpoint)
        self._states = None
        if tensors:
            stage = stage_at(self.at.step, self._stages)
            count = stage.batch_size // stage.micro_size
            self._states = carry.from_tensors(self.model, stage.micro_size, count, tensors)
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
                    self.journal.train(self.at, self.meter, rates, self.routing)
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
        stage = stage_at(step, self._stages)
        if step == stage.first_step and step:
            self._announce(stage)
        batch = self.tools.batch(step)
        num_scored = int((batch.targets_BT != IGNORED).sum())
        scale = self.plan.scale(step)
        self.optimizers.set_lr_scale(scale)
        loss = 0.0
        states = []
        self.routing.restart()
        try:
            for index, micro in enumerate(self._micro_batches(batch, stage.micro_size)):
                self.stop.poll()
                before = self._states[index] if self._states else None
                share, after = self._backward(micro, num_scored, before)
                loss += share
                states.append(after)
            grad_norm = self._update.finish(loss)
        except BaseException:
            self.optimizers.zero_grad()
            rng.restore()
            raise
        self._feed_back(scale)
        num_tokens = batch.tokens_BT.numel()
        seconds = time.perf_counter() - started
        goes_on = self.config.state_passing and stage == stage_at(step + 1, self._stages)
        self._states = tuple(states) if goes_on else None
        self.at.advance(loss, num_scored, num_tokens, grad_norm, scale, seconds)
        flops = 3 * num_tokens * sum(self.model.flops_per_token(stage.context_len).values())
        self.meter.add(num_tokens, flops, seconds)
        self._report()

    def _announce(self, stage: Stage) -> None:
        again = "; the carried states start anew" if self.config.state_passing else ""
        log.info(
            "step %d: from here on contexts of %d tokens, %d to a step%s",
            self.at.step,
            stage.context_len,
            stage.batch_size,
            again,
        )

    def _micro_batches(self, batch: Batch, micro_size: int) -> Iterator[Batch]:
        for start in range(0, len(batch.tokens_BT), micro_size):
            rows = slice(start, start + micro_size)
            yield Batch(*(part[rows].to(self.device) for part in batch))

    def _backward(
        self, micro: Batch, num_scored: int, state: LMState | None
    ) -> tuple[float, LMState]:
        """Add the micro-batch's share to the gradients; returns its share of the loss, and what
        the next step goes on from.

        The share is by scored tokens, so that accumulating gives the mean over the whole batch.
        """
        share = int((micro.targets_BT != IGNORED).sum()) / max(1, num_scored)
        if state is None:
            state = self.model.init_state(len(micro.tokens_BT))
        with autocast(self.precision, self.device):
            loss, state, told = self._loss(micro.tokens_BT, micro.targets_BT, state, micro.doc_BT)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss of the next step is {value}")
        torch.autograd.backward(loss * share)
        # what is told is the loss of the text alone
        return (value - self.routing.add(told, share)) * share, carry.carried(state)

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
        try:
            with torch.no_grad(), autocast(self.precision, self.device):
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
        self.saver.save(self.at, carry.to_tensors(self._states or ()))

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
