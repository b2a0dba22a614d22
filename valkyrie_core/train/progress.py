"""Where a training stands, how fast it goes, and what it tells about itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from valkyrie_core.errors import CheckpointError

LATER = frozenset({"revived"})
"""Counters that checkpoints of earlier versions lack; they begin as they do in a new training."""


class Health(NamedTuple):
    """How evenly the experts of all layers were used in a step."""

    max_vio: float
    """The largest load over the mean load, less 1, of the worst layer."""
    dead: int
    """Experts with less than a tenth of a fair load, over all layers."""


class Thought(NamedTuple):
    """What came of the questions of a canvas that ended lately."""

    accuracy: float
    """The share of right answers."""
    steps: float
    """Mean steps of thought."""


class Validation(NamedTuple):
    """The result of a validation."""

    bpb: float
    """Bits per byte, all corpora's bytes together."""
    by_corpus: Mapping[str, float]
    """Bits per byte of each corpus."""


class StepEvent(NamedTuple):
    """What a trainer tells after every step and every validation."""

    step: int
    """Steps done."""
    steps: int
    """The horizon."""
    loss: float | None
    """Nats per token of the last step."""
    lr: float
    """Learning rate of the first optimizer."""
    tokens_per_second: float | None
    """None before the second step of a sitting: the first one warms up."""
    eta_seconds: float | None
    """Seconds of training that are left, validations not counted."""
    mfu: float | None
    """Share of the machine's measured matmul peak."""
    validation: Validation | None = None
    """Set where a validation has just ended."""
    message: str | None = None
    """A line worth showing."""
    experts: Health | None = None
    """How evenly experts were used; None: there are none."""
    thought: Thought | None = None
    """What came of questions; None: none ended, or none are asked."""


@dataclass
class Position:
    """Everything that a training counts; it goes into the checkpoint as JSON."""

    step: int = 0
    """Optimizer steps done."""
    tokens_seen: int = 0
    """Training tokens read."""
    seconds: float = 0.0
    """Seconds of training, all sittings together."""
    validated: int = 0
    """The step of the last validation."""
    best_step: int | None = None
    """The step of the best validation."""
    best_bpb: float | None = None
    """Its bits per byte."""
    loss: float | None = None
    """Mean loss of the last step, in nats per scored token."""
    grad_norm: float = 0.0
    """Global gradient norm of the last step, before clipping."""
    lr_scale: float = 0.0
    """Share of the peak learning rate in the last step."""
    loss_sum: float = 0.0
    """Nats since the last row of metrics."""
    loss_tokens: int = 0
    """Scored tokens since the last row of metrics."""
    revived: list[list[int]] = field(default_factory=list)
    """Experts replaced since the last row of metrics: layer, expert, the one that was copied."""

    def advance(
        self,
        loss: float,
        num_scored: int,
        num_tokens: int,
        grad_norm: float,
        lr_scale: float,
        seconds: float,
    ) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.tokens_seen += num_tokens
        self.seconds += seconds
        self.grad_norm, self.lr_scale = grad_norm, lr_scale
        if num_scored or self.loss is None:
            self.loss = loss
        self.loss_sum += loss * num_scored
        self.loss_tokens += num_scored

    def take_mean_loss(self) -> float:
        """Nats per scored token since this was last asked."""
        if not self.loss_tokens:
            # no step since then had a target
            return self.loss or 0.0
        mean = self.loss_sum / self.loss_tokens
        self.loss_sum, self.loss_tokens = 0.0, 0
        return mean

    def take_revived(self) -> list[list[int]]:
        """The experts replaced since this was last asked."""
        revived, self.revived = self.revived, []
        return revived

    def to_meta(self) -> dict[str, Any]:
        """As JSON; floats come back exactly."""
        return asdict(self)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Position:
        """What `to_meta` gave; CheckpointError where fields are missing or unknown."""
        names = {one.name for one in fields(cls)}
        if names - LATER != meta.keys() - LATER:
            raise CheckpointError(f"the checkpoint's counters are not {sorted(names)}")
        return cls(**meta)


class Meter:
    """Speed over the last steps of this sitting; the first step is a warm-up and not counted."""

    WINDOW = 50

    def __init__(self, *, peak_flops: float | None) -> None:
        self._peak_flops = peak_flops
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=self.WINDOW)
        self._warm = False
        self._tokens, self._flops, self._seconds = 0, 0, 0.0

    def add(self, num_tokens: int, flops: int, seconds: float) -> None:
        """Count one step and its floating-point operations."""
        if not self._warm:
            self._warm = True
            return
        self._steps.append((num_tokens, flops, seconds))
        self._tokens += num_tokens
        self._flops += flops
        self._seconds += seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens per second, over the last steps."""
        if not self._steps:
            return None
        return sum(tokens for tokens, _, _ in self._steps) / self._recent_seconds

    @property
    def sitting_tokens_per_second(self) -> float | None:
        """Training tokens per second, over all steps of this sitting but the first."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs (three times forward) per second as a share of the peak."""
        if not self._steps:
            return None
        return self._share(sum(flops for _, flops, _ in self._steps), self._recent_seconds)

    @property
    def sitting_mfu(self) -> float | None:
        """The same over this sitting."""
        return self._share(self._flops, self._seconds)

    def seconds_for(self, steps: int) -> float | None:
        """How long `steps` more will take at the present speed."""
        if not self._steps:
            return None
        return steps * self._recent_seconds / len(self._steps)

    @property
    def _recent_seconds(self) -> float:
        return sum(seconds for _, _, seconds in self._steps)

    def _share(self, flops: int, seconds: float) -> float | None:
        if not seconds or self._peak_flops is None:
            return None
        return flops / seconds / self._peak_flops
