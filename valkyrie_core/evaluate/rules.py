"""Rules that end thought: by name, of a recipe, and put to work in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import Discriminator, Field
from torch import Tensor

from valkyrie_core.config import Config
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.answering import Done, TokenRule
from valkyrie_core.nn.canvas import HALT, Canvas, CanvasOutput
from valkyrie_core.nn.canvas_core import CanvasConfig
from valkyrie_core.nn.halting import (
    KL,
    Argmax,
    ArgmaxConfig,
    Confidence,
    ConfidenceConfig,
    KLConfig,
    Latent,
    LatentConfig,
)
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.recursive import Recursive, RecursiveConfig


class QHaltConfig(Config):
    """As in the training of a canvas: q_halt above zero, or above q_continue."""

    type: Literal["q_halt"] = "q_halt"
    min_loops: int = Field(default=1, ge=1)
    """Nothing halts before."""


Rule = Annotated[
    LatentConfig | KLConfig | ArgmaxConfig | ConfidenceConfig | QHaltConfig, Discriminator("type")
]
_RULES: dict[str, type[Config]] = {
    "latent": LatentConfig,
    "kl": KLConfig,
    "argmax": ArgmaxConfig,
    "confidence": ConfidenceConfig,
    "q_halt": QHaltConfig,
}
_VALUES = {
    "latent": "threshold",
    "kl": "threshold",
    "argmax": "patience",
    "confidence": "threshold",
}


def rule_of(text: str, *, min_depth: int = 1) -> Rule:
    """The rule that `kl=0.001`, `argmax=2`, `confidence` and the like name. Raises UsageError."""
    name, equals, value = text.partition("=")
    known = ", ".join((*_RULES, "calibrated", "none"))
    if name not in _RULES:
        raise UsageError(f"there is no rule of halting {name!r}", hint=f"there are: {known}")
    settings: dict[str, float] = {"min_loops": min_depth}
    try:
        if equals:
            key = _VALUES[name]
            settings[key] = int(value) if key == "patience" else float(value)
        rule: Rule = _RULES[name].model_validate(settings)  # type: ignore[assignment]
    except (KeyError, ValueError):
        raise UsageError(
            f"{text!r} is no rule of halting",
            hint="latent=0.03, kl=0.001, argmax=2, confidence=0.9 and q_halt are",
        ) from None
    return rule


def own_rule(model: Model) -> Rule | None:
    """What ends thought early by the recipe."""
    core = model.config.core
    if isinstance(core, CanvasConfig):
        return QHaltConfig()
    return core.halting if isinstance(core, RecursiveConfig) else None


def has_depths(model: Model) -> bool:
    """Whether it can think for longer or shorter."""
    return isinstance(model, Canvas) or isinstance(model.core, Recursive)


def full_depth(model: Model) -> int:
    """Loops, or steps, as in training; 1 for a model without."""
    if isinstance(model, Canvas):
        return model.max_steps
    return model.core.loops if isinstance(model.core, Recursive) else 1


def becomes_of_sure(model: Model, rule: Rule | None = None) -> Literal["halt", "cheapest"]:
    """What a rule does with what is done; None: one of confidence."""
    core = model.core
    if not isinstance(core, Recursive) or not (rule is None or isinstance(rule, ConfidenceConfig)):
        return "halt"
    return core.halting.then if isinstance(core.halting, Confidence) else "halt"


def canvas_rule(model: Canvas, rule: Rule) -> TokenRule | Done:
    """What ends a question, as `answers` takes it."""
    if isinstance(rule, QHaltConfig):
        return lambda out: model.halts(out.q_BQ)
    if isinstance(rule, ConfidenceConfig):

        def sure(out: CanvasOutput) -> Tensor:
            # in bf16 all that is fairly sure would be certain
            return out.q_BQ[:, HALT].float().sigmoid() >= rule.threshold

        return sure
    return rule.build(model.config.dim)


def let_halt(model: HybridLM, rule: Rule) -> None:
    """From now on the model's tokens halt by a rule. UsageError where it knows no such one."""
    with looping(model, rule, None):
        core = model.core
        assert isinstance(core, Recursive)
        halting = core.halting
    core.halting, core.halts = halting, True


@contextmanager
def thinking_up_to(model: Model, depth: int | None) -> Iterator[None]:
    """The model thinks for so many loops, or steps, at most while this lasts; None: as ever."""
    if depth is None:
        yield
    elif isinstance(model, Canvas):
        before, model.max_steps = model.max_steps, depth
        try:
            yield
        finally:
            model.max_steps = before
    else:
        with looping(model, None, depth):
            yield


@contextmanager
def looping(model: HybridLM, rule: Rule | None, depth: int | None) -> Iterator[None]:
    """The model runs so many loops at most while this lasts, and its tokens halt by the rule.

    Raises UsageError where it can't.
    """
    core = model.core
    if not isinstance(core, Recursive):
        if rule is not None or depth not in (None, 1):
            raise UsageError(
                "the run's model has no loops: every token runs through all of its layers",
                hint="models with core: {type: recursive} or {type: canvas} have depths",
            )
        yield
        return
    before = (core.loops, core.halting, core.halts)
    core.loops = depth or core.loops
    if rule is not None:
        core.halting, core.halts = _token_rule(core, rule, model.config.dim), True
    else:
        core.halts = False
    try:
        yield
    finally:
        core.loops, core.halting, core.halts = before


def _token_rule(core: Recursive, rule: Rule, dim: int) -> Latent | KL | Argmax | Confidence:
    if isinstance(rule, QHaltConfig):
        raise UsageError("q_halt is a canvas's; a looped model has confidence")
    if core.asks_head_too_early(rule):
        raise UsageError(
            f"the rule {rule.type} asks the head, which can't read before the coda",
            hint="--halt latent asks nobody",
        )
    if not isinstance(rule, ConfidenceConfig):
        return rule.build(dim)
    if not isinstance(core.halting, Confidence):
        raise UsageError(
            "the run has learned no confidence",
            hint="train with model.core.halting: {type: confidence}, or use another rule",
        )
    return core.halting.at(rule.threshold, rule.min_loops)
