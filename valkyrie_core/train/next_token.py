"""The loss of a language model: the next token of packed text, in stages, states carried on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from valkyrie_core.data.batch import Batch
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.state import LMState
from valkyrie_core.train import carry
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.device import autocast
from valkyrie_core.train.metrics import Row
from valkyrie_core.train.objective import Running, Work
from valkyrie_core.train.progress import Thought
from valkyrie_core.train.routing import Routing
from valkyrie_core.train.stages import Stage, stage_at, stages

log = logging.getLogger("valkyrie")


class NextToken:
    """See `Objective`."""

    def __init__(
        self,
        config: SupervisedConfig,
        model: HybridLM,
        batch: Callable[[int], Batch],
        routing: Routing,
        running: Running,
    ) -> None:
        self._config = config
        self._model = model
        self._batch = batch
        self._routing = routing
        self._running = running
        self._stages = stages(config)
        self._states: tuple[LMState, ...] | None = None
        """Of each micro-batch, to go on from; None: the next step starts without."""
        self._after: tuple[LMState, ...] = ()
        self._loss = model.loss
        if config.compile is not None:
            log.info("the model is compiled: its first step takes up to a minute")
            self._loss = model.compiled_loss(config.compile.mode)

    def gradients(self, step: int) -> Work:
        """Adds the gradients of a step."""
        stage = stage_at(step, self._stages)
        if step == stage.first_step and step:
            self._announce(step, stage)
        batch = self._batch(step)
        num_scored = int((batch.targets_BT != IGNORED).sum())
        loss, states = 0.0, []
        for index, micro in enumerate(self._micro_batches(batch, stage.micro_size)):
            self._running.poll()
            before = self._states[index] if self._states else None
            share, after = self._backward(micro, num_scored, before)
            loss += share
            states.append(after)
        self._after = tuple(states)
        num_tokens = batch.tokens_BT.numel()
        flops = 3 * num_tokens * sum(self._model.flops_per_token(stage.context_len).values())
        return Work(loss, num_scored, num_tokens, flops)

    def settle(self, step: int) -> None:
        """States go on, where that is asked for."""
        stage = stage_at(step, self._stages)
        goes_on = self._config.state_passing and stage == stage_at(step + 1, self._stages)
        self._states = self._after if goes_on else None

    def metrics(self) -> Row:
        """The loss says it all."""
        return {}

    @property
    def thought(self) -> Thought | None:
        """Text asks nothing."""
        return None

    def to_tensors(self) -> dict[str, Tensor]:
        """The carried states."""
        return carry.to_tensors(self._states or ())

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from carried states."""
        self._states = None
        if tensors:
            stage = stage_at(step, self._stages)
            count = stage.batch_size // stage.micro_size
            self._states = carry.from_tensors(self._model, stage.micro_size, count, tensors)

    def _announce(self, step: int, stage: Stage) -> None:
        again = "; the carried states start anew" if self._config.state_passing else ""
        log.info(
            "step %d: from here on contexts of %d tokens, %d to a step%s",
            step,
            stage.context_len,
            stage.batch_size,
            again,
        )

    def _micro_batches(self, batch: Batch, micro_size: int) -> Iterator[Batch]:
        for start in range(0, len(batch.tokens_BT), micro_size):
            rows = slice(start, start + micro_size)
            yield Batch(*(part[rows].to(self._running.device) for part in batch))

    def _backward(
        self, micro: Batch, num_scored: int, state: LMState | None
    ) -> tuple[float, LMState]:
        """Add the micro-batch's share to the gradients; returns its share of the loss, and what
        the next step goes on from.

        The share is by scored tokens, so that accumulating gives the mean over the whole batch.
        """
        share = int((micro.targets_BT != IGNORED).sum()) / max(1, num_scored)
        if state is None:
            state = self._model.init_state(len(micro.tokens_BT))
        with autocast(self._running.precision, self._running.device):
            loss, state, told = self._loss(micro.tokens_BT, micro.targets_BT, state, micro.doc_BT)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._running.diverged(f"the loss of the next step is {value}")
        torch.autograd.backward(loss * share)
        # what is told is the loss of the text alone
        return (value - self._routing.add(told, share)) * share, carry.carried(state)
