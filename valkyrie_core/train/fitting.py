"""A training that does not fit the machine as it is written, made smaller step by step.

Only what costs memory or time changes: how weights are stored and updated, and how many tokens a
step has. The model stays what it is. What changes changes what is learned, so a recipe has to name
`train.fit` for it, and everything that was changed is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from valkyrie_core.errors import ResourceError, UsageError
from valkyrie_core.train.config import FittedKey, SupervisedConfig
from valkyrie_core.train.optim import AdafactorConfig

FITTED: tuple[FittedKey, ...] = get_args(FittedKey)
SHORTEST_CONTEXT = 64
SECONDS_BETWEEN_SAVES = 1800
"""A slow training is saved at least so often."""


class StepCost(NamedTuple):
    """What one optimizer step takes."""

    peak_bytes: int
    """Of the whole process."""
    seconds: float


class Change(NamedTuple):
    """One key that is not as it was written."""

    key: str
    before: Any
    after: Any


class Fitted(NamedTuple):
    """A training that fits."""

    train: SupervisedConfig
    cost: StepCost
    changes: tuple[Change, ...]
    """None where it fits as it is written."""


def fit(
    train: SupervisedConfig, cost: Callable[[SupervisedConfig], StepCost], memory_bytes: int
) -> Fitted:
    """The first of ever smaller trainings that fits into memory and into `fit.step_seconds`.

    Raises:
        ResourceError: the smallest one does not fit either.
    """
    assert train.fit is not None
    found = train
    taken = cost(found)
    smaller = _in_less_memory(train)
    while taken.peak_bytes > memory_bytes:
        following = next(smaller, None)
        if following is None:
            raise ResourceError(
                f"the model does not fit: in the least memory a step takes "
                f"{taken.peak_bytes / 2**30:.1f} GiB, and {memory_bytes / 2**30:.1f} are there",
                hint="take a smaller model.dim, fewer layers or a smaller vocabulary",
            )
        found = following
        taken = cost(found)
    while taken.seconds > train.fit.step_seconds:
        # no more than that, since a step takes some time whatever its length; each look costs time
        halvings = max(1, int(math.log2(taken.seconds / train.fit.step_seconds)))
        shorter = found
        for _ in range(halvings):
            shorter = _fewer_tokens(shorter) or shorter
        if shorter == found:
            break
        found = shorter
        taken = cost(found)
    if found == train:
        return Fitted(train, taken, ())
    found = _at_its_pace(found, train, taken.seconds)
    every = [Change(key, getattr(train, key), getattr(found, key)) for key in FITTED]
    changes = tuple(one for one in every if one.before != one.after)
    # the run's recipe tells which keys are not the user's
    kept = train.fit.model_copy(update={"changed": tuple(one.key for one in changes)})
    return Fitted(_changed(found, fit=kept), taken, changes)


def as_fitted(stored: SupervisedConfig, given: SupervisedConfig) -> SupervisedConfig:
    """What a run goes on with: what was changed when it began stays so, wherever it goes on.

    Raises UsageError where the rest of what is given does not go with it.
    """
    if given.fit is None or stored.fit is None or not stored.fit.changed:
        return given
    fit = given.fit.model_copy(update={"changed": stored.fit.changed})
    kept = {key: getattr(stored, key) for key in stored.fit.changed}
    try:
        return _changed(given, fit=fit, **kept)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"what was given does not go with what the run was fitted to "
            f"({', '.join(f'train.{key}' for key in kept)}): {why}",
            hint="go on without it, or begin another run under a new name, --set name=...",
        ) from error


def tokens_per_step(train: SupervisedConfig) -> int:
    """Tokens of one optimizer step."""
    return train.batch_size * train.context_len


def _in_less_memory(train: SupervisedConfig) -> Iterator[SupervisedConfig]:
    """Ever smaller in memory: what changes the least of what is learned comes first."""
    if not train.activation_checkpointing:
        yield (train := _changed(train, activation_checkpointing=True))
    if train.update == "after_backward" and train.grad_accum_steps < train.batch_size:
        yield (train := _changed(train, grad_accum_steps=train.batch_size))
    # no gradient is kept, so that nothing can be accumulated: a step is one micro-batch
    yield (
        train := _changed(
            train,
            weights="bf16",
            ema=None,
            optimizer=train.optimizer
            if isinstance(train.optimizer, AdafactorConfig)
            else AdafactorConfig(),
            update="in_backward",
            batch_size=1,
            grad_accum_steps=1,
            context_schedule=(),
        )
    )
    while (shorter := _fewer_tokens(train)) is not None:
        yield (train := shorter)


def _fewer_tokens(train: SupervisedConfig) -> SupervisedConfig | None:
    """Half as many tokens per step: fewer sequences first, then shorter ones."""
    if train.context_schedule:
        # its stages are made of the tokens of a step
        train = _changed(train, context_schedule=())
    if train.batch_size > 1:
        half = train.batch_size // 2
        accumulation = train.grad_accum_steps
        while half % accumulation:
            accumulation -= 1
        return _changed(train, batch_size=half, grad_accum_steps=accumulation)
    half = train.context_len // 2
    span = half if train.state_passing is None else train.state_passing.span
    if half < SHORTEST_CONTEXT or span % half:
        return None
    return _changed(train, context_len=half)


def _at_its_pace(
    train: SupervisedConfig, written: SupervisedConfig, step_seconds: float
) -> SupervisedConfig:
    """Validations and checkpoints that go with slow steps."""
    changes: dict[str, Any] = {}
    tokens = tokens_per_step(train)
    if tokens < tokens_per_step(written):
        changes["eval_tokens"] = min(train.eval_tokens, max(256, tokens))
    often = max(1, int(SECONDS_BETWEEN_SAVES / step_seconds))
    if train.save_steps > often:
        changes["save_every"] = often
    return _changed(train, **changes)


def _changed(train: SupervisedConfig, **changes: Any) -> SupervisedConfig:
    """Validated as a whole: keys depend on each other."""
    plain = {
        key: value.model_dump() if hasattr(value, "model_dump") else value
        for key, value in changes.items()
    }
    return SupervisedConfig.model_validate(train.model_dump() | plain)
