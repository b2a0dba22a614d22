"""What a training step computes: gradients of some loss, and what the next step goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from valkyrie_core.errors import DivergedError
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.train.metrics import Row
from valkyrie_core.train.progress import Thought


class Work(NamedTuple):
    """What a step came to."""

    loss: float
    """Nats per scored token."""
    num_scored: int
    num_tokens: int
    """Tokens read."""
    flops: int
    """Three times those of a forward pass, but for what runs without gradients."""


class Objective(Protocol):
    """The loss of one training, with its place in the text."""

    def gradients(self, step: int) -> Work:
        """Adds the gradients of a step; an error leaves the place in the text as it was."""
        ...

    def settle(self, step: int) -> None:
        """The step's update is done: the next one goes on from here."""
        ...

    def metrics(self) -> Row:
        """What is worth a row of metrics beside the loss."""
        ...

    @property
    def thought(self) -> Thought | None:
        """What came of questions since metrics were last asked; None: there are none."""
        ...

    def to_tensors(self) -> dict[str, Tensor]:
        """What the next step goes on from, for a checkpoint."""
        ...

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `to_tensors` gave. CheckpointError where it does not fit."""
        ...


class Running(NamedTuple):
    """How a step is run."""

    precision: Precision
    device: torch.device
    poll: Callable[[], None]
    """Raises where a signal asks to stop."""
    diverged: Callable[[str], DivergedError]
    """The error of a sentence about what is not finite."""
