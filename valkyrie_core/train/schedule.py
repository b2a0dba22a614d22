"""Learning-rate schedules as pure functions of the step: no scheduler object, nothing to save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Discriminator, Field

from valkyrie_core.config import Config
from valkyrie_core.errors import CheckpointError


class CosineConfig(Config):
    """Linear warm-up, then half a cosine that ends at `final_ratio`."""

    type: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""


class WSDConfig(Config):
    """Warm-up, stable, decay: constant at the peak, then linear down to `final_ratio`."""

    type: Literal["wsd"] = "wsd"
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """The share of all steps, at the end, over which the rate falls."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""


Schedule = Annotated[CosineConfig | WSDConfig, Discriminator("type")]


class Extension(NamedTuple):
    """A continuation of a finished run: `steps` more, after step `start`."""

    start: int
    steps: int


def lr_scale(schedule: Schedule, step: int, steps: int, *, start_ratio: float = 0.0) -> float:
    """The learning rate of one optimizer step, as a share of the peak.

    `step` counts from 0 to `steps` - 1. The warm-up rises linearly from `start_ratio` and reaches
    the peak with its last step; a warm-up longer than the run is cut to the run. `final_ratio` is
    where the curve stands when the last step is done, so even a `final_ratio` of 0 gives the last
    step something to do.
    """
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return start_ratio + (1.0 - start_ratio) * (step + 1) / warmup
    final = schedule.final_ratio
    if isinstance(schedule, CosineConfig):
        progress = (step - warmup) / max(1, steps - warmup)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay_steps = max(1, round(schedule.decay_fraction * steps))
    left = (steps - step) / decay_steps
    return final + (1.0 - final) * min(1.0, left)


class LRPlan:
    """The learning rate over a run and its extensions: a pure function of the step.

    An extension runs the same schedule again over its own steps: from the rate at which the run
    ended up to the full peak (the configured warm-up, but at most a tenth of the extension), then
    down again. Re-warming to the peak and decaying anew is what works for cosine (Ibrahim et al.
    2024, arXiv 2403.08763) and for WSD (WSD-S, arXiv 2410.05192).
    """

    def __init__(
        self, schedule: Schedule, steps: int, extensions: Sequence[Extension] = ()
    ) -> None:
        self.schedule = schedule
        self.steps = steps
        self.extensions = tuple(extensions)
        for end, extension in zip(self.ends, self.extensions, strict=False):
            if extension.start != end or extension.steps < 1:
                raise CheckpointError(f"the extension history is not a chain: {self.extensions}")

    @property
    def ends(self) -> tuple[int, ...]:
        """The steps at which the run ended: the first horizon, then each extension's."""
        return (self.steps, *(start + steps for start, steps in self.extensions))

    @property
    def horizon(self) -> int:
        """The step at which the run is finished."""
        return self.ends[-1]

    def scale(self, step: int) -> float:
        """The learning rate of step `step` (from 0), as a share of the peak."""
        for start, steps in reversed(self.extensions):
            if step >= start:
                warmup = min(self.schedule.warmup_steps, max(1, steps // 10))
                again = self.schedule.model_copy(update={"warmup_steps": warmup})
                ratio = self.schedule.final_ratio
                return lr_scale(again, step - start, steps, start_ratio=ratio)
        return lr_scale(self.schedule, step, self.steps)

    def describe_extension(self) -> str:
        """One line on what the schedule does over the last extension."""
        start, steps = self.extensions[-1]
        warmup = min(self.schedule.warmup_steps, max(1, steps // 10))
        return (
            f"steps {start} to {start + steps}: the {self.schedule.type} schedule runs again, from "
            f"{self.schedule.final_ratio:g} of the peak up to the peak in {warmup} steps, then "
            f"down to {self.schedule.final_ratio:g}"
        )
