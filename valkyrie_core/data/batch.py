"""Training batches: a pure function of (seed, step).

Shapes: B batch, T time. A training window is T + 1 tokens of a corpus's stream, read as a ring;
an epoch cuts the ring into windows that share no target, from a random place on, and shuffles
them. There is no loader state: any step's batch can be computed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from valkyrie_core.data.dataset import Dataset
from valkyrie_core.data.packing import PackedSplit

IGNORED = -100
"""The target of a token that is not scored."""
_BLOCK = 840
"""Samples per block of a mixture: divisible by 1 to 8, so simple ratios are exact."""

_DOCUMENTS = 1 << 31
"""More than the document ids of one sample."""

Int64 = npt.NDArray[np.int64]
Row = tuple[Int64, Int64, Int64]
"""Tokens, targets and document ids [T]."""


class Batch(NamedTuple):
    """int64 tensors [B, T]: targets are the next tokens, labels instead of them, or -100; equal
    ids, equal document."""

    tokens_BT: Tensor
    targets_BT: Tensor
    doc_BT: Tensor


def random_bits(count: int, *key: object) -> npt.NDArray[np.uint64]:
    """So many random numbers, a function of the key alone."""
    # raw Philox bits: numpy keeps these the same in every version, unlike shuffle()
    name = "|".join(map(str, key)).encode()
    generator = np.random.Philox(key=xxhash.xxh3_128_intdigest(name))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


class _Windows:
    """The endless sequence of training windows of one corpus."""

    def __init__(self, split: PackedSplit, *, key: tuple[object, ...], context_len: int) -> None:
        self._split = split
        self._key = key
        self._context_len = context_len
        self._length = len(split.tokens)
        self._per_epoch = max(1, self._length // context_len)
        self._ends: list[int] = []
        self._epochs: dict[int, Int64] = {}

    def row(self, number: int) -> Row:
        """Tokens, targets and document ids [T] of one window."""
        epoch, index = self._locate(number)
        return self._window(int(self._starts(epoch)[index]))

    def _locate(self, number: int) -> tuple[int, int]:
        if self._split.scored is None:
            return divmod(number, self._per_epoch)
        # windows without a scored target are skipped, so epochs differ in length
        while not self._ends or self._ends[-1] <= number:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._starts(len(self._ends))))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        return epoch, number - (self._ends[epoch - 1] if epoch else 0)

    def _starts(self, epoch: int) -> Int64:
        """Where the windows of one epoch start, in the order in which they are drawn."""
        if epoch not in self._epochs:
            bits = random_bits(self._per_epoch + 1, *self._key, epoch)
            phase = int(bits[0] % np.uint64(self._length))
            starts = phase + np.arange(self._per_epoch, dtype=np.int64) * self._context_len
            starts = starts[np.argsort(bits[1:], kind="stable")]
            if (scored := self._split.scored) is not None:
                starts = starts[[self._has_target(scored, start) for start in starts.tolist()]]
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = starts
        return self._epochs[epoch]

    def _has_target(self, scored: npt.NDArray[np.uint8], start: int) -> bool:
        if self._split.labels is not None:
            return bool((self._window(start)[1] != IGNORED).any())
        places = np.arange(start + 1, start + 1 + self._context_len) % self._length
        return bool(scored[places].any())

    def _window(self, start: int) -> Row:
        split = self._split
        positions = np.arange(start, start + self._context_len + 1)
        turns, places = np.divmod(positions, self._length)
        tokens = split.tokens[places].astype(np.int64)
        targets = tokens[1:].copy()
        if split.scored is not None:
            targets[split.scored[places[1:]] == 0] = IGNORED
        if split.labels is not None:
            labels = split.labels[places[:-1]]
            targets = np.where(labels == IGNORED, targets, labels)
            # of a row that the window cuts nobody could say what it comes to
            next_start = split.doc_starts[np.searchsorted(split.doc_starts, places[0])]
            targets[: next_start - places[0]] = IGNORED
        # a document that comes again after a turn of the ring is another one
        documents = np.searchsorted(split.doc_starts, places, side="right") - 1
        documents += turns * split.num_documents
        return tokens[:-1], targets, documents[:-1]


class Mixture:
    """Which corpus a sample is of.

    Every block of 840 samples holds each corpus's exact share (rounded to whole samples, at least
    one), in an order drawn from (seed, block). `weights` needs no normalisation.
    """

    def __init__(self, weights: Mapping[str, float], *, seed: int, order: int = 0) -> None:
        """`order` tells mixtures apart that draw from the same seed."""
        self.names = sorted(weights)
        self._key = (seed, "mixture", *((order,) if order else ()))
        self._quotas = _quotas([weights[name] for name in self.names], _BLOCK)
        self._blocks: dict[int, tuple[Int64, Int64]] = {}

    def sample(self, number: int) -> tuple[int, int]:
        """The corpus of a sample of the endless sequence, and how many of it came before."""
        block, place = divmod(number, int(self._quotas.sum()))
        corpora, ranks = self._block(block)
        corpus = int(corpora[place])
        return corpus, block * int(self._quotas[corpus]) + int(ranks[place])

    def _block(self, block: int) -> tuple[Int64, Int64]:
        """For each sample of a block: its corpus, and how many of that corpus came before it."""
        if block not in self._blocks:
            corpora = np.repeat(np.arange(len(self._quotas)), self._quotas)
            bits = random_bits(len(corpora), *self._key, block)
            corpora = corpora[np.argsort(bits, kind="stable")]
            ranks = np.zeros_like(corpora)
            for corpus, quota in enumerate(self._quotas):
                ranks[corpora == corpus] = np.arange(quota)
            self._blocks = {block: (corpora, ranks)}
        return self._blocks[block]


class BatchStream:
    """The training batches of a mixture of corpora."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        weights: Mapping[str, float],
        seed: int,
        batch_size: int,
        context_len: int,
        order: int = 0,
    ) -> None:
        """`order` tells streams apart that draw from the same seed."""
        if set(weights) != set(dataset.corpora):
            raise ValueError(f"weights {sorted(weights)} for corpora {sorted(dataset.corpora)}")
        salt = (order,) if order else ()
        self._mixture = Mixture(weights, seed=seed, order=order)
        self.batch_size, self.context_len = batch_size, context_len
        self._windows = [
            _Windows(
                dataset.corpora[name].train,
                key=(seed, name, "windows", *salt),
                context_len=context_len,
            )
            for name in self._mixture.names
        ]

    def batch(self, step: int) -> Batch:
        """The batch of a step, B x T; the same at every call."""
        first = step * self.batch_size
        return _stacked([self.row(number) for number in range(first, first + self.batch_size)])

    def row(self, number: int) -> Row:
        """The tokens, targets and documents [T] of one sample of the endless sequence of them."""
        corpus, index = self._mixture.sample(number)
        return self._windows[corpus].row(index)


class LaneStream:
    """Batches whose rows go on from step to step: row b of a step follows row b of the last one.

    A row reads the samples of a stream of long windows in chunks, one chunk a step; samples have
    documents of their own, so that a state carried from one to the next starts anew. The rows'
    places in their samples are spread evenly, so that they do not begin at the same step.
    """

    def __init__(self, stream: BatchStream, context_len: int) -> None:
        """`context_len` tokens make a chunk; it must divide the stream's windows."""
        if stream.context_len % context_len:
            raise ValueError(f"chunks of {context_len} do not make {stream.context_len} tokens")
        self._stream = stream
        self._context_len = context_len
        self._chunks = stream.context_len // context_len
        self._samples: dict[int, Row] = {}

    def batch(self, step: int) -> Batch:
        """The batch of a step, B x T; the same at every call."""
        B = self._stream.batch_size
        return _stacked([self._chunk(row, step + row * self._chunks // B) for row in range(B)])

    def _chunk(self, row: int, place: int) -> Row:
        """The chunk at `place` of all that a row ever reads."""
        turn, chunk = divmod(place, self._chunks)
        number = turn * self._stream.batch_size + row
        cut = slice(chunk * self._context_len, (chunk + 1) * self._context_len)
        tokens, targets, documents = self._sample(number)
        return tokens[cut], targets[cut], documents[cut] + number * _DOCUMENTS

    def _sample(self, number: int) -> Row:
        if number not in self._samples:
            while len(self._samples) >= 2 * self._stream.batch_size:
                del self._samples[next(iter(self._samples))]
            self._samples[number] = self._stream.row(number)
        return self._samples[number]


def _stacked(rows: list[Row]) -> Batch:
    tokens, targets, documents = zip(*rows, strict=True)
    return Batch(
        torch.from_numpy(np.stack(tokens)),
        torch.from_numpy(np.stack(targets)),
        torch.from_numpy(np.stack(documents)),
    )


def _quotas(weights: list[float], size: int) -> Int64:
    """Whole shares of a block, by largest remainder, at least one each."""
    size = max(size, 10 * len(weights))
    exact = np.array(weights) / sum(weights) * size
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    for corpus in order[: max(0, size - int(quotas.sum()))]:
        quotas[corpus] += 1
    while quotas.sum() > size:
        quotas[np.argmax(quotas)] -= 1
    return quotas
