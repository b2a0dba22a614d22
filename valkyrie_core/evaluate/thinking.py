"""How much thought an answer takes: every depth by itself, and rules that end it early.

A depth is a number of loops of a looped language model, or of steps of a canvas. What halts is a
token of the former, and a question of the latter.

Shapes: B batch, T time, C cells; N documents, D depths.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field
from torch import Tensor

from valkyrie_core.config import Config
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.errors import UsageError
from valkyrie_core.evaluate.bits import (
    Chunk,
    Compute,
    chunks,
    cut_documents,
    read_chunks,
    reading_length,
)
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.answering import Done, TokenRule, answers
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
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.recursive import Recursive, RecursiveConfig
from valkyrie_core.nn.state import LMState

BATCH_SIZE = 32


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
    name, _, value = text.partition("=")
    known = ", ".join(_RULES)
    if name not in _RULES:
        raise UsageError(f"there is no rule of halting {name!r}", hint=f"there are: {known}")
    settings: dict[str, float] = {"min_loops": min_depth}
    try:
        if value:
            key = _VALUES[name]
            settings[key] = int(value) if key == "patience" else float(value)
        rule: Rule = _RULES[name].model_validate(settings)  # type: ignore[assignment]
    except (KeyError, ValueError):
        raise UsageError(
            f"{text!r} is no rule of halting",
            hint="latent=0.03, kl=0.001, argmax=2, confidence=0.9 and q_halt are",
        ) from None
    return rule


class Thought(NamedTuple):
    """What became of a split's documents."""

    right: list[bool]
    """Whether all that is scored of a document is what the model says, in the split's order."""
    steps: Counter[int]
    """Tokens, or questions, by the depth at which they ended."""
    seconds: float

    @property
    def share(self) -> float:
        """Of right documents."""
        return sum(self.right) / len(self.right)

    @property
    def mean_steps(self) -> float:
        """Depth of a token, or of a question."""
        return sum(depth * count for depth, count in self.steps.items()) / self.steps.total()


def own_rule(model: Model) -> Rule | None:
    """What ends thought early by the recipe."""
    core = model.config.core
    if isinstance(core, CanvasConfig):
        return QHaltConfig()
    return core.halting if isinstance(core, RecursiveConfig) else None


def full_depth(model: Model) -> int:
    """Loops, or steps, as in training; 1 for a model without."""
    if isinstance(model, Canvas):
        return model.max_steps
    return model.core.loops if isinstance(model.core, Recursive) else 1


def think(
    model: Model,
    split: PackedSplit,
    *,
    rule: Rule | None = None,
    depth: int | None = None,
    context_len: int,
    max_tokens: int | None = None,
    precision: Precision = "fp32",
) -> Thought:
    """Asks what a split holds.

    Args:
        rule: what ends thought; None: nothing but the depth.
        depth: loops or steps at most; None: as in training.
        context_len: tokens per forward pass of a language model.
        max_tokens: only the first so many tokens of the split.

    Raises UsageError where the model knows no such rule.
    """
    began = time.perf_counter()
    right = [True] * split.num_documents
    steps: Counter[int] = Counter()

    def add(chunk: Chunk, found: tuple[Tensor, Tensor]) -> None:
        wrong_BT, depth_BT = (x.cpu() for x in found)
        for document in set(chunk.doc_BT[wrong_BT].tolist()):
            right[document] = False
        # a canvas tells once for a question what a language model tells for each of its tokens
        steps.update(depth_BT[(depth_BT > 0) & (chunk.doc_BT >= 0)].tolist())

    length = reading_length(model, split, context_len)
    pieces = cut_documents(split, length, context="carried", max_tokens=max_tokens)
    layout = chunks(split, pieces, batch_size=BATCH_SIZE, context_len=length)
    if isinstance(model, Canvas):
        read_chunks(model, layout, precision, _canvas_reader(model, rule, depth), add)
    else:
        with looping(model, rule, depth):
            read_chunks(model, layout, precision, _reader(model), add)
    return Thought(right, steps, time.perf_counter() - began)


def by_depth(
    model: Model,
    split: PackedSplit,
    deepest: int,
    *,
    context_len: int,
    precision: Precision = "fp32",
) -> dict[int, float]:
    """The share of right documents where everything is thought about for so long and no longer."""
    depths = range(1, deepest + 1)
    if not isinstance(model, Canvas):
        return {
            depth: think(
                model, split, depth=depth, context_len=context_len, precision=precision
            ).share
            for depth in depths
        }
    # the steps of one pass are those of all shallower ones
    right_D = torch.zeros(deepest, dtype=torch.int64)

    def read(
        tokens_BT: Tensor, targets_BT: Tensor, state: LMState, doc_BT: Tensor
    ) -> tuple[Tensor, LMState]:
        tokens_BC, targets_BC = model.laid_out(tokens_BT, targets_BT)
        right = [_right_B(out.logits_BCV, targets_BC) for out in model.steps(tokens_BC, deepest)]
        return torch.stack(right).sum(1), state

    def add(_chunk: Chunk, found_D: Tensor) -> None:
        right_D.add_(found_D.cpu())

    length = reading_length(model, split, context_len)
    pieces = cut_documents(split, length, context="carried", max_tokens=None)
    layout = chunks(split, pieces, batch_size=BATCH_SIZE, context_len=length)
    read_chunks(model, layout, precision, read, add)
    return {depth: int(right_D[depth - 1]) / split.num_documents for depth in depths}


def _right_B(logits_BCV: Tensor, targets_BC: Tensor) -> Tensor:
    """Which whole answers of a canvas are right; what is not finite is not."""
    right_BC = (logits_BCV.argmax(-1) == targets_BC) | (targets_BC == IGNORED)
    return right_BC.all(1) & logits_BCV.isfinite().all(-1).all(1)


def _reader(model: HybridLM) -> Compute[tuple[Tensor, Tensor]]:
    def read(
        tokens_BT: Tensor, targets_BT: Tensor, state: LMState, doc_BT: Tensor
    ) -> tuple[tuple[Tensor, Tensor], LMState]:
        out = model(tokens_BT, state, doc_BT)
        right_BT = (out.logits_BTV.argmax(-1) == targets_BT) & out.logits_BTV.isfinite().all(-1)
        depth_BT = out.told.loops_BT
        if depth_BT is None:
            depth_BT = torch.full_like(tokens_BT, full_depth(model))
        return (~right_BT & (targets_BT != IGNORED), depth_BT), out.state

    return read


def _canvas_reader(
    model: Canvas, rule: Rule | None, depth: int | None
) -> Compute[tuple[Tensor, Tensor]]:
    done = None if rule is None else canvas_rule(model, rule)
    least = 1 if rule is None else rule.min_loops

    def read(
        tokens_BT: Tensor, targets_BT: Tensor, state: LMState, doc_BT: Tensor
    ) -> tuple[tuple[Tensor, Tensor], LMState]:
        tokens_BC, targets_BC = model.laid_out(tokens_BT, targets_BT)
        scored_BC = targets_BC != IGNORED
        found = answers(
            model, tokens_BC, done, watched_BC=scored_BC, min_steps=least, max_steps=depth
        )
        right_B = _right_B(found.logits_BCV, targets_BC)
        wrong_BT, depth_BT = torch.zeros_like(tokens_BT, dtype=torch.bool), tokens_BT * 0
        wrong_BT[:, 0], depth_BT[:, 0] = ~right_B, found.steps_B
        return (wrong_BT, depth_BT), state

    return read


def canvas_rule(model: Canvas, rule: Rule) -> TokenRule | Done:
    """What ends a question, as `answers` takes it."""
    if isinstance(rule, QHaltConfig):
        return lambda out: model.halts(out.q_BQ)
    if isinstance(rule, ConfidenceConfig):

        def sure(out: CanvasOutput) -> Tensor:
            return out.q_BQ[:, HALT].sigmoid() >= rule.threshold

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


class Confidences(NamedTuple):
    """What a model says of its own answers at every depth, and what they were worth."""

    said: Tensor
    """Between 0 and 1, float64 [...]."""
    held: Tensor
    """Whether it was so, bool [...]."""
    going_on: Tensor | None
    """What q_continue says, where it is learned."""


def confidences(
    model: Model,
    split: PackedSplit,
    *,
    context_len: int,
    max_tokens: int | None = None,
    precision: Precision = "fp32",
) -> Confidences | None:
    """Of a canvas: that the answer is right, after every step. Of a looped model: that a scored
    token is what all loops would say, after every loop but the last. None where none is learned."""
    said, held, going_on = [], [], []

    def add(chunk: Chunk, found: Sequence[Tensor]) -> None:
        said.append(found[0].double().cpu())
        held.append(found[1].cpu())
        if len(found) > 2:
            going_on.append(found[2].double().cpu())

    length = reading_length(model, split, context_len)
    pieces = cut_documents(split, length, context="carried", max_tokens=max_tokens)
    layout = chunks(split, pieces, batch_size=BATCH_SIZE, context_len=length)
    if isinstance(model, Canvas):
        read_chunks(model, layout, precision, _canvas_confidences(model), add)
    elif isinstance(model.core, Recursive) and isinstance(model.core.halting, Confidence):
        if model.core.loops == 1:
            return None
        read_chunks(model, layout, precision, model.confidences, add)
    else:
        return None
    return Confidences(torch.cat(said), torch.cat(held), torch.cat(going_on) if going_on else None)


def _canvas_confidences(model: Canvas) -> Compute[tuple[Tensor, ...]]:
    def read(
        tokens_BT: Tensor, targets_BT: Tensor, state: LMState, doc_BT: Tensor
    ) -> tuple[tuple[Tensor, ...], LMState]:
        tokens_BC, targets_BC = model.laid_out(tokens_BT, targets_BT)
        outs = list(model.steps(tokens_BC))
        held = [_right_B(out.logits_BCV, targets_BC) for out in outs]
        q_NQ = torch.cat([out.q_BQ for out in outs]).sigmoid()
        return (q_NQ[:, HALT], torch.cat(held), *q_NQ.T[HALT + 1 :]), state

    return read


def calibration_error(said_N: Tensor, held_N: Tensor, bins: int = 10) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv 1706.04599): of confidences in bins of
    equal width, the mean distance between what was said and how often it held."""
    which_N = (said_N * bins).long().clamp(max=bins - 1)
    total = 0.0
    for number in range(bins):
        own_N = which_N == number
        if bool(own_N.any()):
            gap = said_N[own_N].mean() - held_N[own_N].double().mean()
            total += float(gap.abs()) * int(own_N.sum())
    return total / len(said_N)


class Said(NamedTuple):
    """What a language model holds for likeliest at every scored place of a split's documents."""

    tokens: list[list[int]]
    """By document, in the split's order."""
    steps: Counter[int]
    """Tokens by the depth at which they ended."""
    seconds: float

    def differs(self, other: Said) -> list[float]:
        """The share of each document's places where something else is said; documents without a
        scored place say nothing, and are left out."""
        return [
            sum(a != b for a, b in zip(mine, theirs, strict=True)) / len(mine)
            for mine, theirs in zip(self.tokens, other.tokens, strict=True)
            if mine
        ]


def said_by(
    model: HybridLM,
    split: PackedSplit,
    *,
    rule: Rule | None = None,
    context_len: int,
    precision: Precision = "fp32",
) -> Said:
    """What a language model says of a text, its tokens halting by a rule.

    Raises UsageError where the model knows no such rule.
    """
    began = time.perf_counter()
    tokens: list[list[int]] = [[] for _ in range(split.num_documents)]
    steps: Counter[int] = Counter()

    def read(
        tokens_BT: Tensor, targets_BT: Tensor, state: LMState, doc_BT: Tensor
    ) -> tuple[tuple[Tensor, Tensor], LMState]:
        out = model(tokens_BT, state, doc_BT)
        said_BT = out.logits_BTV.argmax(-1).masked_fill(targets_BT == IGNORED, IGNORED)
        depth_BT = out.told.loops_BT
        if depth_BT is None:
            depth_BT = torch.full_like(tokens_BT, full_depth(model))
        return (said_BT, depth_BT), out.state

    def add(chunk: Chunk, found: tuple[Tensor, Tensor]) -> None:
        said_BT, depth_BT = (x.cpu() for x in found)
        for row, document in enumerate(chunk.doc_BT[:, 0].tolist()):
            own_T = said_BT[row]
            tokens[document] += own_T[own_T != IGNORED].tolist()
        steps.update(depth_BT[(depth_BT > 0) & (chunk.doc_BT >= 0)].tolist())

    pieces = cut_documents(split, context_len, context="carried", max_tokens=None)
    layout = chunks(split, pieces, batch_size=BATCH_SIZE, context_len=context_len)
    with looping(model, rule, None):
        read_chunks(model, layout, precision, read, add)
    return Said(tokens, steps, time.perf_counter() - began)
