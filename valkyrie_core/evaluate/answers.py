"""Which answers a model would give: exact, and in one forward pass.

A question has one right answer. Decoding greedily gives exactly that answer if, and only if, at
every place of it the likeliest token is the right one while the answer so far stands before it: so
all places are read at once, whatever is scored of a document being its answer.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.evaluate.bits import (
    PADDING_DOCUMENT,
    Chunk,
    chunks,
    cut_documents,
    read_chunks,
    reading_length,
)
from valkyrie_core.nn.models import Model


class Answered(NamedTuple):
    """What became of a corpus's held-out questions."""

    right: list[bool]
    """In the corpus's order."""
    difficulty: list[int]
    """Likewise."""
    constant: float
    """The share that one answer for all gets right."""

    def by_level(self) -> dict[int, float]:
        """The share of right answers, by difficulty."""
        found: dict[int, list[bool]] = {}
        for right, level in zip(self.right, self.difficulty, strict=True):
            found.setdefault(level, []).append(right)
        return {level: sum(own) / len(own) for level, own in sorted(found.items())}


def answered(
    model: Model,
    corpus: QuestionsCorpus,
    split: PackedSplit,
    *,
    context_len: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Answered:
    """Asks a model the held-out questions of a corpus, which `split` holds."""
    asked = corpus.held_out()
    right = right_answers(model, split, context_len=context_len, precision=precision)
    assert len(right) == len(asked)
    return Answered(right, [one.difficulty for one in asked], corpus.constant_answer())


def right_answers(
    model: Model,
    split: PackedSplit,
    *,
    context_len: int,
    batch_size: int = 32,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> list[bool]:
    """Whether every document's answer, its end included, is what greedy decoding gives.

    Args:
        context_len: tokens per forward pass; longer documents are read in several.
        batch_size: documents side by side; changes speed alone.
        progress: called with the positions read and their total; what it raises ends the reading.
    """
    context_len = reading_length(model, split, context_len)
    pieces = cut_documents(split, context_len, context="carried", max_tokens=None)
    total = sum(piece.end - piece.start - 1 for piece in pieces)
    right = [False] * (len(split.doc_starts) - 1)
    for piece in pieces:
        right[piece.document] = True
    read = 0

    def add(chunk: Chunk, wrong_BT: Tensor) -> None:
        nonlocal read
        for document in set(chunk.doc_BT[wrong_BT.cpu()].tolist()):
            right[document] = False
        read += int((chunk.doc_BT != PADDING_DOCUMENT).sum())
        if progress is not None:
            progress(read, total)

    layout = chunks(split, pieces, batch_size=batch_size, context_len=context_len)
    read_chunks(model, layout, precision, model.misses, add)
    return right
