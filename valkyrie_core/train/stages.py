"""The stages of a training: contexts that grow while the tokens per step stay the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

from valkyrie_core.data.batch import Batch, BatchStream, LaneStream
from valkyrie_core.data.dataset import Dataset
from valkyrie_core.errors import UsageError
from valkyrie_core.train.config import SupervisedConfig

log = logging.getLogger("valkyrie")


class Stage(NamedTuple):
    """A part of a training in which every step has the same shape."""

    number: int
    first_step: int
    context_len: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per optimizer step."""
    micro_size: int
    """Sequences of one forward pass."""


def stages(config: SupervisedConfig) -> tuple[Stage, ...]:
    """All stages, in order; an extended run stays in the last one.

    Two stages that fall on the same step (few steps, close fractions) leave the later one.
    """
    shapes = [(0, config.context_len)] + [
        (math.ceil(entry.from_fraction * config.steps), entry.context_len)
        for entry in config.context_schedule
    ]
    tokens = config.batch_size * config.context_len
    found: list[Stage] = []
    for first_step, context_len in shapes:
        batch_size = tokens // context_len
        micro_size = batch_size // math.gcd(config.grad_accum_steps, batch_size)
        if found and found[-1].first_step == first_step:
            found.pop()
        found.append(Stage(len(found), first_step, context_len, batch_size, micro_size))
    return tuple(found)


def stage_at(step: int, all_stages: tuple[Stage, ...]) -> Stage:
    """The stage that a step (from 0) belongs to."""
    return next(stage for stage in reversed(all_stages) if stage.first_step <= step)


def trained_context(config: SupervisedConfig, steps_done: int) -> int:
    """The longest context that so many steps have trained; the first, before any."""
    begun = [stage for stage in stages(config) if stage.first_step < max(1, steps_done)]
    return max(stage.context_len for stage in begun)


def _check_span(dataset: Dataset, span: int) -> None:
    """Warns where a corpus is read more than once in a stretch; UsageError where all are."""
    sizes = {name: corpus.train.counts.tokens for name, corpus in dataset.corpora.items()}
    short = {name: size for name, size in sizes.items() if size < span}
    told = ", ".join(f"{name} has {size:,} tokens" for name, size in short.items())
    if len(short) == len(sizes):
        raise UsageError(
            f"train.state_passing.span ({span:,}) is longer than every corpus: {told}",
            hint="take a shorter span, or more text",
        )
    if short:
        log.warning("%s: less than the span of %d, and read again inside it", told, span)


def training_batches(
    dataset: Dataset, config: SupervisedConfig, seed: int
) -> Callable[[int], Batch]:
    """The batch of every step: a pure function of the seed and the step."""
    all_stages = stages(config)
    if config.state_passing is not None:
        _check_span(dataset, config.state_passing.span)
    streams: list[BatchStream | LaneStream] = []
    for stage in all_stages:
        span = stage.context_len if config.state_passing is None else config.state_passing.span
        stream = BatchStream(
            dataset,
            weights=dataset.weights,
            seed=seed,
            batch_size=stage.batch_size,
            context_len=span,
            # a stage must not begin with what the last one began with
            order=stage.number,
        )
        streams.append(
            stream if config.state_passing is None else LaneStream(stream, stage.context_len)
        )

    def batch(step: int) -> Batch:
        stage = stage_at(step, all_stages)
        return streams[stage.number].batch(step - stage.first_step)

    return batch
