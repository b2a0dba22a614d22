"""Bits per byte: how well a model compresses held-out text, whatever its tokenizer.

Shapes: B batch (documents side by side), T time, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from valkyrie_core.config import Config
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import DivergedError, StoppedError
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.model import IGNORED
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.state import LMState

PADDING_DOCUMENT = -1
Found = TypeVar("Found")
Compute = Callable[[Tensor, Tensor, LMState, Tensor], tuple[Found, LMState]]
"""Of tokens, targets, the state and documents: what is found, and the state."""

Context = Literal["carried", "window"]
"""What a token is predicted from.

`carried`: all of its document before it; the state is carried from chunk to chunk.
`window`: at most context_len tokens, at least half of that once the document is so long: windows
of context_len that overlap by half, of which the second half is scored. It costs twice as much and
never asks attention for positions that it was not trained on.
"""


class BitsPerByte(Config):
    """The score of a model on one text."""

    bpb: float
    """Bits per UTF-8 byte of scored text; lower is better."""
    nats: float
    """Summed cross-entropy of the scored tokens."""
    tokens: int
    """Scored tokens; markers are none."""
    bytes: int
    """UTF-8 bytes of the scored tokens."""
    documents: int
    """Documents with at least one scored token."""
    seconds: float
    """Wall-clock time."""
    context: Context
    """What a token was predicted from."""
    context_len: int
    """Tokens per chunk or window."""
    precision: Literal["fp32", "bf16"]
    """The arithmetic of the matrix products."""
    complete: bool
    """False if it was stopped, or limited to the first tokens."""


class Piece(NamedTuple):
    """A stretch of one document: it reads [start, end) and is scored from `score_from` on.

    Positions are those of the split; the token at position p is predicted by what is before it.
    """

    document: int
    start: int
    score_from: int
    end: int


class Chunk(NamedTuple):
    """One forward pass."""

    tokens_BT: Tensor
    targets_BT: Tensor
    doc_BT: Tensor
    offset: int
    """Tokens of each piece before it; 0: the state before it is that of no token."""
    first_B: Tensor
    """Where each row's first token stands in its document."""


def bits_per_byte(
    model: Model,
    split: PackedSplit,
    *,
    context_len: int,
    batch_size: int = 8,
    context: Context = "carried",
    max_tokens: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> BitsPerByte:
    """Scores every scored text token of a split exactly once; markers are read, not scored.

    Args:
        context_len: tokens per chunk or window.
        batch_size: documents (or windows) side by side; changes speed, not the score.
        max_tokens: only the first so many tokens of the split.
        progress: called with the positions read and their total after every chunk.
        stop: polled before every chunk; what was scored so far is then the result.

    Raises:
        ValueError: nothing in the split is scored.
        DivergedError: the loss is not finite.
        StoppedError: stopped before anything was scored.
    """
    began = time.perf_counter()
    length = reading_length(model, split, context_len)
    pieces = cut_documents(split, length, context=context, max_tokens=max_tokens)
    total = sum(piece.end - piece.start - 1 for piece in pieces)
    tally = _Tally(split)

    def add(chunk: Chunk, losses_BT: Tensor) -> None:
        tally.add(chunk, losses_BT)
        if progress is not None:
            progress(tally.read, total)

    layout = chunks(split, pieces, batch_size=batch_size, context_len=length)
    stopped = read_chunks(model, layout, precision, model.token_losses, add, stop)
    return tally.score(
        seconds=time.perf_counter() - began,
        context=context,
        context_len=context_len,
        precision=precision,
        stopped=stopped,
        complete=not stopped and (max_tokens is None or max_tokens >= len(split.tokens)),
    )


class ItemScore(NamedTuple):
    """What one document, or one stretch of it, costs."""

    document: int
    """From 0, in the split's order."""
    stretch: int
    """From 0, in the document's order."""
    nats: float
    bytes: int
    """Of the scored text."""


def item_scores(
    model: Model,
    split: PackedSplit,
    *,
    context_len: int,
    batch_size: int = 8,
    context: Context = "carried",
    max_tokens: int | None = None,
    of_document: int | None = None,
    stretch: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> list[ItemScore]:
    """The cost of every document by itself; all together are what `bits_per_byte` gives.

    Args:
        max_tokens: only the first so many tokens of the split.
        stretch: stretches of so many tokens of a document are counted by themselves.
        progress: called with the positions read and their total; what it raises ends the reading.

    Raises DivergedError where a loss is not finite.
    """
    context_len = reading_length(model, split, context_len)
    pieces = cut_documents(
        split, context_len, context=context, max_tokens=max_tokens, of_document=of_document
    )
    total = sum(piece.end - piece.start - 1 for piece in pieces)
    nats: dict[tuple[int, int], float] = {}
    sizes: dict[tuple[int, int], int] = {}
    read = 0

    def add(chunk: Chunk, losses_BT: Tensor) -> None:
        nonlocal read
        losses_BT = losses_BT.cpu().double()
        lengths_BT = np.where(
            chunk.targets_BT == IGNORED, 0, split.token_lengths[chunk.targets_BT.clamp(min=0)]
        )
        places_T = np.arange(chunk.tokens_BT.shape[1])
        for row, document in enumerate(chunk.doc_BT[:, 0].tolist()):
            first = int(chunk.first_B[row])
            stretches_T = (first + places_T) // stretch if stretch else np.zeros_like(places_T)
            for number in np.unique(stretches_T).tolist():
                own_T = stretches_T == number
                key = (document, number)
                cost = float(losses_BT[row][torch.from_numpy(own_T)].sum())
                nats[key] = nats.get(key, 0.0) + cost
                sizes[key] = sizes.get(key, 0) + int(lengths_BT[row][own_T].sum())
        read += int((chunk.doc_BT != PADDING_DOCUMENT).sum())
        if progress is not None:
            progress(read, total)

    layout = chunks(split, pieces, batch_size=batch_size, context_len=context_len)
    read_chunks(model, layout, precision, model.token_losses, add)
    if not all(map(math.isfinite, nats.values())):
        raise _diverged()
    # where nothing is scored there is nothing to compare
    return [ItemScore(*key, nats[key], sizes[key]) for key in sorted(nats) if sizes[key]]


def read_chunks(
    model: Model,
    layout: Iterator[Chunk],
    precision: Literal["fp32", "bf16"],
    compute: Compute[Found],
    add: Callable[[Chunk, Found], None],
    stop: Callable[[], bool] | None = None,
) -> bool:
    """Hands every chunk and what is computed of it to `add`; returns whether `stop` ended it."""
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    state = model.init_state(1)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast:
            for chunk in layout:
                if stop is not None and stop():
                    return True
                if chunk.offset == 0:
                    state = model.init_state(chunk.tokens_BT.shape[0])
                tokens_BT, targets_BT, doc_BT = (x.to(device) for x in chunk[:3])
                found, state = compute(tokens_BT, targets_BT, state, doc_BT)
                add(chunk, found)
    finally:
        model.train(was_training)
    return False


def _diverged() -> DivergedError:
    return DivergedError(
        "the loss on the validation text is not finite",
        hint="the weights are damaged or the training diverged: take an earlier checkpoint",
    )


class _Tally:
    """Sums over the chunks that were scored."""

    def __init__(self, split: PackedSplit) -> None:
        self.token_lengths = split.token_lengths
        self.nats = 0.0
        self.tokens = self.bytes = self.read = 0
        self.documents: set[int] = set()

    def add(self, chunk: Chunk, losses_BT: Tensor) -> None:
        """Adds one chunk; the losses are 0 where nothing is scored."""
        self.nats += float(losses_BT.cpu().double().sum())
        scored_BT = chunk.targets_BT != IGNORED
        self.tokens += int(scored_BT.sum())
        self.bytes += int(self.token_lengths[chunk.targets_BT[scored_BT].numpy()].sum())
        self.documents.update(chunk.doc_BT[scored_BT].tolist())
        self.read += int((chunk.doc_BT != PADDING_DOCUMENT).sum())

    def score(
        self,
        *,
        seconds: float,
        context: Context,
        context_len: int,
        precision: Literal["fp32", "bf16"],
        stopped: bool,
        complete: bool,
    ) -> BitsPerByte:
        """The result; raises as `bits_per_byte` says."""
        if not math.isfinite(self.nats):
            raise _diverged()
        if self.bytes == 0:
            if stopped:
                raise StoppedError("the evaluation was stopped before any text was scored")
            raise ValueError("no text was scored")
        return BitsPerByte(
            bpb=self.nats / math.log(2) / self.bytes,
            nats=self.nats,
            tokens=self.tokens,
            bytes=self.bytes,
            documents=len(self.documents),
            seconds=seconds,
            context=context,
            context_len=context_len,
            precision=precision,
            complete=complete,
        )


def reading_length(model: Model, split: PackedSplit, context_len: int) -> int:
    """Tokens of a chunk or window: a canvas reads a document as a whole."""
    if isinstance(model, Canvas):
        return int(np.diff(split.doc_starts).max())
    return context_len


def cut_documents(
    split: PackedSplit,
    context_len: int,
    *,
    context: Context,
    max_tokens: int | None,
    of_document: int | None = None,
) -> list[Piece]:
    """The pieces that score every token after a document's first marker exactly once.

    Args:
        max_tokens: so many in all.
        of_document: the first so many of each document.
    """
    pieces: list[Piece] = []
    left = len(split.tokens) if max_tokens is None else max_tokens
    for document in range(len(split.doc_starts) - 1):
        start, end = map(int, split.doc_starts[document : document + 2])
        most = left if of_document is None else min(left, of_document)
        end = min(end, start + most)
        left -= end - start
        # the marker that begins a document is read, not predicted
        first = start + 1
        if first >= end:
            continue
        if context == "carried":
            pieces.append(Piece(document, start, first, end))
            continue
        while first < end:
            # the last token is a target only: context_len inputs are context_len + 1 tokens
            last = min(start + context_len + 1, end)
            pieces.append(Piece(document, start, first, last))
            first, start = last, last - 1 - context_len // 2
    return pieces


def chunks(
    split: PackedSplit, pieces: list[Piece], *, batch_size: int, context_len: int
) -> Iterator[Chunk]:
    """Lays pieces side by side, the longest first, and cuts them in chunks of context_len.

    A group of pieces begins with a fresh state, so the memory of a key-value cache is bounded by
    the longest document. Equal lengths keep their order: the layout is deterministic.
    """
    order = sorted(pieces, key=lambda piece: piece.start - piece.end)
    for begin in range(0, len(order), batch_size):
        group = order[begin : begin + batch_size]
        longest = group[0].end - group[0].start - 1
        for offset in range(0, longest, context_len):
            width = min(context_len, longest - offset)
            tokens_BT = torch.zeros(len(group), width, dtype=torch.int64)
            targets_BT = torch.full_like(tokens_BT, IGNORED)
            doc_BT = torch.full_like(tokens_BT, PADDING_DOCUMENT)
            for row, piece in enumerate(group):
                _fill_row(split, piece, offset, tokens_BT[row], targets_BT[row], doc_BT[row])
            first_B = torch.tensor(
                [piece.start - int(split.doc_starts[piece.document]) + offset for piece in group]
            )
            yield Chunk(tokens_BT, targets_BT, doc_BT, offset, first_B)


def _fill_row(
    split: PackedSplit,
    piece: Piece,
    offset: int,
    tokens_T: Tensor,
    targets_T: Tensor,
    doc_T: Tensor,
) -> None:
    start = piece.start + offset
    length = min(len(tokens_T), piece.end - 1 - start)
    if length <= 0:
        return
    ids = np.asarray(split.tokens[start : start + length + 1]).astype(np.int64)
    tokens_T[:length] = torch.from_numpy(ids[:-1])
    # markers stand for no bytes: an end that is predicted well would make the text look easier
    scored = (np.arange(start + 1, start + 1 + length) >= piece.score_from) & (
        ids[1:] >= NUM_RESERVED
    )
    if split.scored is not None:
        scored &= np.asarray(split.scored[start + 1 : start + 1 + length]) != 0
    targets_T[:length] = torch.from_numpy(np.where(scored, ids[1:], IGNORED))
    doc_T[:length] = piece.document
