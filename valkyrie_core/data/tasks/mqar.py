"""MQAR, multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927).

    k1 v1 k2 v2 ... | . k2 . . k1 ...        the target at a query is the value of its key

Pairs of a key and a value come first, then every key once more, at random places. A model that
recalls answers each query with the value that stood behind its key; nothing else is scored. The
values are not shown after the queries, so no answer helps with a later one.

Every problem is a pure function of (seed, index): training and test are ranges of indices that do
not meet.

Shapes: B problems, T time, P pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.batch import IGNORED, Batch

FILLER = 0
"""The token between queries: neither a key nor a value."""
TEST_FROM = 1 << 40
"""Problems from this index on are for testing; training never comes so far."""


class MQARConfig(Config):
    """How large the problems are."""

    vocab_size: int = Field(default=512, ge=8)
    """The filler, then keys, then values, as many of each as fit."""
    length: int = Field(default=128, ge=3)
    """Tokens of a problem."""
    pairs: tuple[int, ...] = Field(default=(4, 8, 16, 32), min_length=1)
    """Numbers of pairs; the problems take turns."""

    @model_validator(mode="after")
    def _pairs_fit(self) -> MQARConfig:
        for pairs in self.pairs:
            if pairs < 1 or 3 * pairs > self.length:
                raise ValueError(f"{pairs} pairs and their queries need {3 * pairs} tokens")
            if pairs > self.num_keys:
                raise ValueError(f"{pairs} pairs need as many keys, there are {self.num_keys}")
        return self

    @property
    def num_keys(self) -> int:
        """How many tokens are keys: 1 to num_keys; as many after them are values."""
        return (self.vocab_size - 1) // 2


def problems(
    config: MQARConfig, seed: int, start: int, count: int, pairs: int | None = None
) -> Batch:
    """Problems `start` to `start + count`, int64 [B, T]; targets are -100 but at the queries.

    Args:
        pairs: how many pairs all of them have; None: the numbers of `config` in turn.
    """
    tokens_BT = np.full((count, config.length), FILLER, dtype=np.int64)
    targets_BT = np.full_like(tokens_BT, IGNORED)
    for row in range(count):
        index = start + row
        own = config.pairs[index % len(config.pairs)] if pairs is None else pairs
        _fill(config, _generator(seed, index), own, tokens_BT[row], targets_BT[row])
    doc_BT = np.repeat(np.arange(start, start + count)[:, None], config.length, axis=1)
    return Batch(*(torch.from_numpy(array) for array in (tokens_BT, targets_BT, doc_BT)))


def _generator(seed: int, index: int) -> np.random.Generator:
    # a hash of both: neighbouring seeds and indices have nothing in common
    key = xxhash.xxh3_128_intdigest(f"mqar|{seed}|{index}".encode())
    return np.random.Generator(np.random.Philox(key=key))


def _fill(
    config: MQARConfig,
    generator: np.random.Generator,
    pairs: int,
    tokens_T: npt.NDArray[np.int64],
    targets_T: npt.NDArray[np.int64],
) -> None:
    """Writes one problem into its row."""
    K = config.num_keys
    keys_P = 1 + generator.permutation(K)[:pairs]
    values_P = 1 + K + generator.integers(K, size=pairs)
    tokens_T[0 : 2 * pairs : 2], tokens_T[1 : 2 * pairs : 2] = keys_P, values_P
    rest = config.length - 2 * pairs
    # every key once, then keys at random, until half of the places are queries
    count = max(pairs, rest // 2)
    asked_Q = np.concatenate([np.arange(pairs), generator.integers(pairs, size=count - pairs)])
    places_Q = 2 * pairs + generator.permutation(rest)[:count]
    tokens_T[places_Q], targets_T[places_Q] = keys_P[asked_Q], values_P[asked_Q]
