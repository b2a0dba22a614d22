"""What models say of their own answers, and what that is worth.

Shapes: B batch, T time; N documents or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from valkyrie_core.evaluate.thinking import BATCH_SIZE, whole_answers_right
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.canvas import HALT, Canvas
from valkyrie_core.nn.halting import (
    Confidence,
)
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.state import LMState


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
        held = [whole_answers_right(out.logits_BCV, targets_BC) for out in outs]
        q_NQ = torch.cat([out.q_BQ for out in outs]).float().sigmoid()
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
