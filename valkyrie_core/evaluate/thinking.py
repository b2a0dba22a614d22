"""How much thought an answer takes: every depth by itself, and rules that end it early.

A depth is a number of loops of a looped language model, or of steps of a canvas. What halts is a
token of the former, and a question of the latter.

Shapes: B batch, T time, C cells; N documents, D depths.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.evaluate.bits import (
    Chunk,
    Compute,
    chunks,
    cut_documents,
    read_chunks,
    reading_length,
)
from valkyrie_core.evaluate.rules import Rule, canvas_rule, full_depth, looping
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.answering import answers
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.state import LMState

BATCH_SIZE = 32


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
        right = [
            whole_answers_right(out.logits_BCV, targets_BC)
            for out in model.steps(tokens_BC, deepest)
        ]
        return torch.stack(right).sum(1), state

    def add(_chunk: Chunk, found_D: Tensor) -> None:
        right_D.add_(found_D.cpu())

    length = reading_length(model, split, context_len)
    pieces = cut_documents(split, length, context="carried", max_tokens=None)
    layout = chunks(split, pieces, batch_size=BATCH_SIZE, context_len=length)
    read_chunks(model, layout, precision, read, add)
    return {depth: int(right_D[depth - 1]) / split.num_documents for depth in depths}


def whole_answers_right(logits_BCV: Tensor, targets_BC: Tensor) -> Tensor:
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
        right_B = whole_answers_right(found.logits_BCV, targets_BC)
        wrong_BT, depth_BT = torch.zeros_like(tokens_BT, dtype=torch.bool), tokens_BT * 0
        wrong_BT[:, 0], depth_BT[:, 0] = ~right_B, found.steps_B
        return (wrong_BT, depth_BT), state

    return read


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
