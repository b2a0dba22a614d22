"""Associative recall: what stood behind a key, of pairs that are drawn anew for every question.

    b7 K2 f9: K=2

In training several keys may be asked for about the same pairs, as in MQAR (Arora et al. 2023,
Zoology, arXiv 2312.04927). A cache of keys and values finds any number of pairs; a state of fixed
size has room for some.
"""

from __future__ import annotations

import re
import string
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

KEYS = string.ascii_letters
VALUES = string.digits


class RecallConfig(Config):
    """How many pairs there are."""

    type: Literal["recall"] = "recall"
    level_key: ClassVar[str] = "pairs"
    pairs: tuple[int, ...] = Field(default=(4, 8, 16), min_length=1)
    """Pairs of a letter and a digit; the levels of difficulty."""
    asked: int = Field(default=1, ge=1, le=1000)
    """Questions about the same pairs in a document that is trained on. Held-out ones ask one."""

    @field_validator("pairs")
    @classmethod
    def _keys_are_enough(cls, pairs: tuple[int, ...]) -> tuple[int, ...]:
        if min(pairs) < 1 or max(pairs) > len(KEYS):
            raise ValueError(f"pairs are between 1 and {len(KEYS)}: each has a letter of its own")
        return pairs

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The numbers of pairs."""
        return tuple(sorted(set(self.pairs)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One question; every pair is asked for alike often."""
        keys = draw.permutation(len(KEYS))[:difficulty]
        values = draw.integers(len(VALUES), size=difficulty)
        pairs = [f"{KEYS[key]}{VALUES[value]}" for key, value in zip(keys, values, strict=True)]
        # of its own, so that what is asked first does not depend on how much is asked
        further = np.random.default_rng(int(draw.integers(2**32)))
        asked = [int(draw.integers(difficulty))]
        asked += further.integers(difficulty, size=self.asked - 1).tolist()
        (question, answer), *more = ((f"{pairs[i][0]}=", pairs[i][1]) for i in asked)
        # all about the same pairs is on one side of the split, in whichever order they come
        canonical = " ".join(sorted(pairs))
        return Example(f"{' '.join(pairs)}: {question}", answer, difficulty, canonical, tuple(more))

    def holds(self, question: str, answer: str) -> bool:
        """Whether that stood behind the key."""
        found = re.fullmatch(r"([A-Za-z]\d(?: [A-Za-z]\d)*): ([A-Za-z])=", question.strip())
        if found is None:
            return False
        pairs = dict(tuple(pair) for pair in found[1].split())
        return pairs.get(found[2]) == answer.strip()
