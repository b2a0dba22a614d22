"""Questions and their answers by number, for a model that reads them as a whole.

Question n is a pure function of (seed, n), as batches are: corpora take turns by their weights,
and each is read in an order drawn anew for every epoch.

Shapes: C cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from valkyrie_core.data.batch import IGNORED, Int64, Mixture, random_bits
from valkyrie_core.data.dataset import Dataset
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.errors import RecipeError


class Question(NamedTuple):
    """int64 tensors [C]."""

    tokens_C: Tensor
    """The question, 0 behind it."""
    targets_C: Tensor
    """The answer and its end, -100 behind them."""


class QuestionStream:
    """The endless sequence of the training questions of a mixture of corpora."""

    def __init__(
        self, dataset: Dataset, *, weights: Mapping[str, float], seed: int, cells: int
    ) -> None:
        """
        Args:
            cells: room for a question, and for an answer.

        Raises RecipeError where a document is no single question, or has no room.
        """
        self._seed, self._cells = seed, cells
        self._mixture = Mixture(weights, seed=seed)
        self._orders: dict[int, tuple[int, Int64]] = {}
        self._splits = [dataset.corpora[name].train for name in self._mixture.names]
        for name, corpus in dataset.corpora.items():
            for split in (corpus.train, corpus.validation):
                check_room(name, split, cells)

    def row(self, number: int) -> Question:
        """Question `number` of the sequence."""
        corpus, index = self._mixture.sample(number)
        split = self._splits[corpus]
        epoch, place = divmod(index, split.num_documents)
        return laid_out(split, int(self._order(corpus, epoch)[place]), self._cells)

    def _order(self, corpus: int, epoch: int) -> Int64:
        """The documents of one epoch, in the order in which they are drawn."""
        if self._orders.get(corpus, (-1,))[0] != epoch:
            name, count = self._mixture.names[corpus], self._splits[corpus].num_documents
            bits = random_bits(count, self._seed, name, "questions", epoch)
            self._orders[corpus] = (epoch, np.argsort(bits, kind="stable"))
        return self._orders[corpus][1]


def laid_out(split: PackedSplit, document: int, cells: int) -> Question:
    """One document's question and answer."""
    start, middle, end = _parts(split, document)
    tokens_C = torch.zeros(cells, dtype=torch.int64)
    targets_C = torch.full((cells,), IGNORED, dtype=torch.int64)
    ids = torch.from_numpy(np.asarray(split.tokens[start:end]).astype(np.int64))
    tokens_C[: middle - start] = ids[: middle - start]
    targets_C[: end - middle] = ids[middle - start :]
    return Question(tokens_C, targets_C)


def check_room(name: str, split: PackedSplit, cells: int) -> None:
    """Raises RecipeError where a document is not one question, or longer than the canvas."""
    longest, where = 0, 0
    for document in range(split.num_documents):
        start, middle, end = _parts(split, document)
        scored = np.asarray(split.scored[start:end]) if split.scored is not None else np.ones(0)
        if middle in (start, end) or not scored[middle - start :].all():
            raise RecipeError(
                f"data.corpora.{name}: {split.names[document]} is not one question and its answer",
                hint="a canvas learns from corpora of the type questions, each asked once",
            )
        if max(middle - start, end - middle) > longest:
            longest, where = max(middle - start, end - middle), document
    if longest > cells:
        raise RecipeError(
            f"data.corpora.{name}: {split.names[where]} has {longest} tokens, and the "
            f"canvas {cells} cells",
            hint=f"set model.core.cells to {longest} or more",
        )


def _parts(split: PackedSplit, document: int) -> tuple[int, int, int]:
    """Where a document's question begins, its answer begins, and its answer ends."""
    start, end = int(split.doc_starts[document]) + 1, int(split.doc_starts[document + 1])
    if split.scored is None:
        return start, start, end
    scored = np.asarray(split.scored[start:end])
    first = int(scored.argmax()) if scored.any() else end - start
    return start, start + first, end
