"""How well a model reads long texts: losses by position and by context, speed and memory by length.

A text is read once from its beginning in chunks, the state carried, so that no more than a chunk of
activations exists at a time. Then the same target tokens are predicted from contexts of several
lengths that end where they begin: what differs between two contexts is the context alone.

Shapes: T time of the text, M stretches of targets, C contexts, S targets of a stretch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import DivergedError, StoppedError
from valkyrie_core.infer.engine import Engine
from valkyrie_core.machine.memory import peak_memory, reset_peak_memory
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.model import IGNORED
from valkyrie_core.nn.state import LMState, num_bytes
from valkyrie_core.nn.state_format import PackedCache, kept_bytes, pack, settle

SHORTEST = 256
"""The shortest context; each next one is twice as long."""
STRETCH = 128
"""Target tokens of one stretch."""
STRETCHES = 8
"""Stretches of targets, spread evenly over where the longest context fits."""
RESAMPLES = 1000
INTERVAL = (0.05, 0.95)
Array = npt.NDArray[np.float64]
Told = Callable[[str, int, int], None]
"""Called with what is read, how many tokens of it have been read, and of how many."""


class Mark(NamedTuple):
    """What reading cost up to some length."""

    length: int
    """Tokens read so far."""
    tokens_per_second: float
    """From the mark before to this one."""
    peak_bytes: int | None
    """The most memory that the process held since the reading began; None: nobody can tell."""
    state_bytes: int
    """Of the recurrent layers' states, which do not grow."""
    cache_bytes: int
    """Of the keys and values of attention."""
    snapshot_bytes: int
    """Of a state that is kept by itself, as a file or a fork of another text keeps it."""


class Carried(NamedTuple):
    """A text read once, from its beginning."""

    nats_T: Array
    """The loss of every token but the first, which nothing predicts; 0 for markers."""
    marks: list[Mark]


class ByContext(NamedTuple):
    """The same targets, predicted from contexts of several lengths."""

    contexts: list[int]
    nats_CM: Array
    """Summed over each stretch."""
    bytes_M: Array
    """UTF-8 bytes of each stretch's targets."""

    def bits_per_byte(self) -> Array:
        """[C], all stretches together."""
        total: Array = self.nats_CM.sum(axis=1) / math.log(2) / self.bytes_M.sum()
        return total


class EffectiveLength(NamedTuple):
    """The longest context at which more context still lowered the loss."""

    tokens: int
    """Longer contexts are not surely better than this one, and this one is than all before it."""
    low: int
    high: int
    """In 90 % of the resamples of the stretches the context with the lowest loss is in between."""


def context_lengths(longest: int) -> list[int]:
    """256, 512, ... up to and with the longest."""
    lengths = []
    length = SHORTEST
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]


def read_carried(
    engine: Engine,
    tokens_T: npt.NDArray[np.int64],
    *,
    chunk: int,
    told: Told | None = None,
    stop: Callable[[], bool] | None = None,
) -> Carried:
    """Reads a text in chunks, and says what it cost at every context length.

    Args:
        tokens_T: the text's tokens, its marker first.
        stop: polled before every chunk.

    Raises:
        DivergedError: a loss is not finite.
        StoppedError: `stop` said so.
    """
    longest = len(tokens_T) - 1
    state = engine.model.init_state(1)
    # one buffer from the beginning: small arrays that stay, one a chunk, would lie between the
    # large blocks that come and go, and the process would grow by megabytes with every chunk
    nats_T = np.zeros(longest)
    marks: list[Mark] = []
    reset_peak_memory()
    since, since_length = time.perf_counter(), 0
    read = 0
    for length in context_lengths(longest):
        while read < length:
            _poll(stop)
            end = min(read + chunk, length)
            nats_T[read:end], state = _losses(engine, tokens_T, read, end, state)
            read = end
            if told is not None:
                told("the text", read, longest)
        now = time.perf_counter()
        recurrent, cached = state_bytes(pack(state, engine.kept))
        snapshot = kept_bytes(pack(settle(engine.model, state), engine.kept))
        speed = (read - since_length) / (now - since)
        marks.append(Mark(read, speed, peak_memory(), recurrent, cached, snapshot))
        since, since_length = time.perf_counter(), read
    return Carried(nats_T, marks)


def read_by_context(
    engine: Engine,
    tokens_T: npt.NDArray[np.int64],
    token_lengths: npt.NDArray[np.int64],
    *,
    contexts: list[int],
    stretches: int = STRETCHES,
    told: Told | None = None,
    stop: Callable[[], bool] | None = None,
) -> ByContext:
    """Predicts the same stretches of targets from contexts of several lengths.

    Args:
        tokens_T: the text; `STRETCH` + 1 tokens more than the longest context, at least.
        token_lengths: the bytes that each token id stands for.
        contexts: tokens that are read before the targets; rising.
        stretches: of targets, at most; they are spread evenly over where the longest context fits.

    Raises:
        ValueError: the text is too short.
        DivergedError: a loss is not finite.
        StoppedError: `stop` said so.
    """
    last, longest = len(tokens_T) - 1 - STRETCH, contexts[-1]
    if last < longest:
        raise ValueError(f"{len(tokens_T)} tokens are too few for a context of {longest}")
    # where the inputs of each stretch of targets begin
    # apart by a stretch at least: no target is scored twice
    count = min(stretches, (last - longest) // STRETCH + 1)
    anchors = np.linspace(longest, last, count).astype(int).tolist()
    total, read = sum(contexts) * len(anchors), 0
    nats_CM = np.zeros((len(contexts), len(anchors)))
    for row, context in enumerate(contexts):
        for column, anchor in enumerate(anchors):
            _poll(stop)
            before = torch.from_numpy(tokens_T[None, anchor - context : anchor])
            known = engine.prefill(before, engine.model.init_state(1), stop=stop)
            if known is None:
                raise StoppedError("the evaluation was stopped")
            nats_S, _ = _losses(engine, tokens_T, anchor, anchor + STRETCH, known.state)
            nats_CM[row, column] = nats_S.sum()
            read += context
            if told is not None:
                told("contexts", read, total)
    bytes_M = [float(token_lengths[tokens_T[a + 1 : a + 1 + STRETCH]].sum()) for a in anchors]
    return ByContext(contexts, nats_CM, np.array(bytes_M))


def effective_length(found: ByContext, seed: int = 0) -> EffectiveLength:
    """How much context helps, with a paired bootstrap over the stretches of targets.

    From one stretch nothing is sure: the shortest context, and an interval of all.
    """
    if found.nats_CM.shape[1] < 2:
        return EffectiveLength(found.contexts[0], found.contexts[0], found.contexts[-1])
    generator = np.random.default_rng(seed)
    M = found.nats_CM.shape[1]
    chosen_RM = generator.integers(0, M, (RESAMPLES, M))
    nats_CR = found.nats_CM[:, chosen_RM].sum(axis=2)
    best = 0
    for row in range(1, len(found.contexts)):
        if np.quantile(nats_CR[row] - nats_CR[best], INTERVAL[1]) < 0:
            best = row
    low, high = np.quantile(nats_CR.argmin(axis=0), INTERVAL, method="nearest")
    return EffectiveLength(*(found.contexts[int(index)] for index in (best, low, high)))


def by_position(
    nats_T: Array, tokens_T: npt.NDArray[np.int64], token_lengths: npt.NDArray[np.int64]
) -> list[tuple[int, int, float | None]]:
    """Bits per byte of the targets at positions [start, end), in buckets that double.

    None where a bucket holds no byte.
    """
    edges = [0, *context_lengths(len(nats_T))]
    bytes_T = token_lengths[tokens_T[1:]]
    found = []
    for start, end in itertools.pairwise(edges):
        size = float(bytes_T[start:end].sum())
        bits = float(nats_T[start:end].sum()) / math.log(2)
        found.append((start, end, bits / size if size else None))
    return found


def state_bytes(state: LMState) -> tuple[int, int]:
    """Bytes of what does not grow with the text, and of the keys and values that do."""
    cached = _cached_bytes(state.layers)
    return num_bytes(state) - cached, cached


def _cached_bytes(part: object) -> int:
    """Of all caches inside of a state: mixers that are made of mixers have theirs."""
    if isinstance(part, KVState | PackedCache):
        return num_bytes(part)
    return sum(map(_cached_bytes, part)) if isinstance(part, tuple) else 0


def _losses(
    engine: Engine, tokens_T: npt.NDArray[np.int64], start: int, end: int, state: LMState
) -> tuple[Array, LMState]:
    """Losses of the targets of inputs [start, end), 0 for markers, and the state after them."""
    ids = torch.from_numpy(tokens_T[None, start : end + 1])
    targets_BT = ids[:, 1:].masked_fill(ids[:, 1:] < NUM_RESERVED, IGNORED)
    losses_BT, state = engine.token_losses(ids[:, :-1], targets_BT, state)
    found: Tensor = losses_BT[0].double().cpu()
    if not bool(torch.isfinite(found).all()):
        raise DivergedError(
            "the loss on the text is not finite",
            hint="the weights are damaged or the training diverged: take an earlier checkpoint",
        )
    return found.numpy(), state


def _poll(stop: Callable[[], bool] | None) -> None:
    if stop is not None and stop():
        raise StoppedError("the evaluation was stopped")
