"""Deep supervision of a canvas: every optimizer step is one step of thought about every question.

The carry of a question is kept from step to step, without gradients; a question that is answered
well enough, by the q-head's word, or that has had all of its steps, makes room for the next one
(HRM, arXiv 2506.21734; TRM, 2510.04871).

Shapes: B questions at a time, C cells, M the memory and the cells, D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.data.questions import Question
from valkyrie_core.errors import CheckpointError
from valkyrie_core.nn.canvas import CONTINUE, HALT, Canvas, CanvasLoss
from valkyrie_core.nn.canvas_core import Carry
from valkyrie_core.nn.model import IGNORED
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.device import autocast
from valkyrie_core.train.metrics import Row
from valkyrie_core.train.objective import Running, Work
from valkyrie_core.train.progress import Thought
from valkyrie_core.train.routing import Routing

METRICS = (
    "reasoning_steps",
    "halt_rate",
    "accuracy",
    "q_halt_mean",
    "q_continue_mean",
    "act_penalty",
)
"""Steps of questions that came to an end, the share of them that the q-head ended before their last
step, and of right ones; the mean of both values of the q-head; its loss, as it is added."""


class Lanes(NamedTuple):
    """The questions that are being thought about."""

    z_H_BMD: Tensor
    z_L_BMD: Tensor
    tokens_BC: Tensor
    targets_BC: Tensor
    steps_B: Tensor
    """Steps that each has had."""
    least_B: Tensor
    """Steps that each has at least: see `QHeadConfig.exploration`."""
    halted_B: Tensor
    """Which make room for another at the next step."""
    asked: Tensor
    """Questions drawn so far."""
    sums_K: Tensor
    """Of each of METRICS, since they were last asked."""
    counts_K: Tensor
    """Likewise."""


def empty_lanes(model: Canvas, batch_size: int, device: torch.device) -> Lanes:
    """Lanes that wait for their first questions."""
    counter_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
    tokens_BC = counter_B[:, None].expand(batch_size, model.cells)
    return Lanes(
        *model.begin(batch_size),
        tokens_BC=tokens_BC,
        targets_BC=tokens_BC,
        steps_B=counter_B,
        least_B=counter_B,
        halted_B=counter_B == 0,
        asked=torch.zeros((), dtype=torch.int64),
        sums_K=torch.zeros(len(METRICS), dtype=torch.float64),
        counts_K=torch.zeros(len(METRICS), dtype=torch.float64),
    )


class DeepSupervision:
    """See `Objective`."""

    def __init__(
        self,
        config: SupervisedConfig,
        model: Canvas,
        question: Callable[[int], Question],
        routing: Routing,
        running: Running,
    ) -> None:
        self._config = config
        self._model = model
        self._question = question
        self._routing = routing
        self._running = running
        self._lanes = empty_lanes(model, config.batch_size, running.device)
        self._after: Lanes | None = None

    def gradients(self, step: int) -> Work:
        """Adds the gradients of a step of thought."""
        before = self._refilled(self._lanes)
        B, C = before.tokens_BC.shape
        size = B // self._config.grad_accum_steps
        last_B = before.steps_B + 1 == self._model.max_steps
        nats, found = 0.0, list[CanvasLoss]()
        for start in range(0, B, size):
            self._running.poll()
            rows = slice(start, start + size)
            carry = Carry(before.z_H_BMD[rows], before.z_L_BMD[rows])
            tokens_BC, targets_BC = before.tokens_BC[rows], before.targets_BC[rows]
            with autocast(self._running.precision, self._running.device):
                one = self._model.loss(tokens_BC, targets_BC, carry, last_B[rows])
            value = float(one.loss.detach())
            if not math.isfinite(value):
                raise self._running.diverged(f"the loss of the next step is {value}")
            torch.autograd.backward(one.loss * (size / B))
            self._routing.add(one.told, size / B)
            nats += float(one.nats_B.sum())
            found.append(one)
        self._after = self._stepped(before, found, last_B)
        num_scored = int((before.targets_BC != IGNORED).sum())
        return Work(
            nats / max(1, num_scored), num_scored, B * C, B * C * self._model.training_flops
        )

    def settle(self, step: int) -> None:
        """The carry goes on."""
        assert self._after is not None
        self._lanes, self._after = self._after, None

    def metrics(self) -> Row:
        """Means since last asked; None of what there was nothing of."""
        means = self._means()
        nothing_K = torch.zeros_like(self._lanes.sums_K)
        self._lanes = self._lanes._replace(sums_K=nothing_K, counts_K=nothing_K)
        return {"recursion": means}

    @property
    def thought(self) -> Thought | None:
        """What came of questions since metrics were last asked."""
        means = self._means()
        accuracy, steps = means["accuracy"], means["reasoning_steps"]
        return None if accuracy is None or steps is None else Thought(accuracy, steps)

    def _means(self) -> dict[str, float | None]:
        sums, counts = self._lanes.sums_K.tolist(), self._lanes.counts_K.tolist()
        return {
            name: total / count if count else None
            for name, total, count in zip(METRICS, sums, counts, strict=True)
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """The lanes."""
        # what is expanded, or is one tensor twice, can't be stored
        return {name: value.clone().contiguous() for name, value in self._lanes._asdict().items()}

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on with the lanes of a checkpoint."""
        device = self._running.device
        like = empty_lanes(self._model, self._config.batch_size, device)._asdict()
        shapes = {name: value.shape for name, value in tensors.items()}
        if shapes != {name: value.shape for name, value in like.items()}:
            raise CheckpointError("the checkpoint's questions are not those of this recipe")
        self._lanes = Lanes(**{name: tensors[name].to(device) for name in like})

    def _refilled(self, lanes: Lanes) -> Lanes:
        """New questions where the last ones have come to an end."""
        halted_B = lanes.halted_B
        count, first = int(halted_B.sum()), int(lanes.asked)
        if not count:
            return lanes
        device = self._running.device
        new = [self._question(number) for number in range(first, first + count)]
        tokens_NC, targets_NC = (torch.stack(part).to(device) for part in zip(*new, strict=True))
        tokens_BC, targets_BC = lanes.tokens_BC.clone(), lanes.targets_BC.clone()
        tokens_BC[halted_B], targets_BC[halted_B] = tokens_NC, targets_NC
        fresh = self._model.begin(len(halted_B))
        anew_B11 = halted_B[:, None, None]
        own = self._model.core.config.halting
        explores_B = torch.rand(len(halted_B)) < own.exploration
        drawn_B = torch.randint(1, self._model.max_steps + 1, (len(halted_B),))
        least_B = torch.where(explores_B, drawn_B, 1).to(device)
        return Lanes(
            z_H_BMD=torch.where(anew_B11, fresh.z_H_BMD, lanes.z_H_BMD),
            z_L_BMD=torch.where(anew_B11, fresh.z_L_BMD, lanes.z_L_BMD),
            tokens_BC=tokens_BC,
            targets_BC=targets_BC,
            steps_B=lanes.steps_B.masked_fill(halted_B, 0),
            least_B=torch.where(halted_B, least_B, lanes.least_B),
            halted_B=torch.zeros_like(halted_B),
            asked=lanes.asked + count,
            sums_K=lanes.sums_K,
            counts_K=lanes.counts_K,
        )

    def _stepped(self, before: Lanes, found: list[CanvasLoss], last_B: Tensor) -> Lanes:
        """The lanes after a step, and what is worth telling of it."""
        q_BQ = torch.cat([one.q_BQ for one in found])
        right_B = torch.cat([one.right_B for one in found])
        steps_B = before.steps_B + 1
        halts_B = self._model.halts(q_BQ) & (steps_B >= before.least_B) & ~last_B
        ended_B = halts_B | last_B
        values: dict[str, Tensor] = {
            "reasoning_steps": steps_B[ended_B],
            "halt_rate": halts_B[ended_B],
            "accuracy": right_B[ended_B],
            "q_halt_mean": q_BQ[:, HALT].sigmoid(),
            "q_continue_mean": q_BQ[:, CONTINUE:].sigmoid(),
            "act_penalty": torch.stack([one.halting.detach() for one in found]),
        }
        sums = [float(values[name].double().sum()) for name in METRICS]
        counts = [float(values[name].numel()) for name in METRICS]
        return before._replace(
            z_H_BMD=torch.cat([one.carry.z_H_BMD for one in found]),
            z_L_BMD=torch.cat([one.carry.z_L_BMD for one in found]),
            steps_B=steps_B,
            halted_B=ended_B,
            sums_K=before.sums_K + torch.tensor(sums, dtype=torch.float64),
            counts_K=before.counts_K + torch.tensor(counts, dtype=torch.float64),
        )
