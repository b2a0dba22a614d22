"""k-hop pointer chasing: follow arrows from a symbol, k times.

    ca bd ab dc: b3=a

Every symbol has one arrow out, and all arrows make one ring: with several rings an even number of
hops would lead back to its start more often than chance. The ring and the order of the arrows are
drawn anew for every question, so that nothing but following them answers it (Saunshi et al. 2025,
arXiv 2502.17416, ask for p hops). Written tightly: of few characters per answer more is learned.
"""

from __future__ import annotations

import re
import string
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

SYMBOLS = string.ascii_lowercase


class KHopConfig(Config):
    """How many arrows, and how many of them are followed."""

    type: Literal["khop"] = "khop"
    level_key: ClassVar[str] = "hops"
    symbols: int = Field(default=8, ge=2, le=len(SYMBOLS))
    """Symbols, each with one arrow."""
    hops: tuple[int, ...] = Field(default=(1, 2, 3, 4), min_length=1)
    """Arrows that are followed; the levels of difficulty."""

    asked: int = Field(default=1, ge=1, le=1000)
    """Questions about the same arrows in a document that is trained on: more of its text teaches.
    Held-out documents ask one."""

    @model_validator(mode="after")
    def _hops_are_some(self) -> KHopConfig:
        if min(self.hops) < 1:
            raise ValueError("hops are at least 1")
        if max(self.hops) >= self.symbols:
            raise ValueError("hops are fewer than symbols, or the ring is run through")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The numbers of hops."""
        return tuple(sorted(set(self.hops)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One question; no symbol but the start is less likely at the end than another."""
        ring = draw.permutation(self.symbols)
        target = np.empty_like(ring)
        target[ring] = np.roll(ring, -1)
        order = draw.permutation(self.symbols)
        start = int(draw.integers(self.symbols))
        arrows = " ".join(f"{SYMBOLS[i]}{SYMBOLS[target[i]]}" for i in order)
        sorted_arrows = "".join(SYMBOLS[i] for i in target)
        question, answer = self._question(target, start, difficulty)
        # of its own, so that what is asked first does not depend on how much is asked
        further = np.random.default_rng(int(draw.integers(2**32)))
        more = [
            self._question(
                target, int(further.integers(self.symbols)), int(further.choice(self.hops))
            )
            for _ in range(self.asked - 1)
        ]
        # all about one ring is on one side of the split, in whichever order its arrows come
        return Example(f"{arrows}: {question}", answer, difficulty, sorted_arrows, tuple(more))

    def holds(self, question: str, answer: str) -> bool:
        """Whether following the arrows leads there."""
        found = re.fullmatch(r"([a-z]{2}(?: [a-z]{2})*): ([a-z])(\d+)=", question.strip())
        if found is None:
            return False
        target = {arrow[0]: arrow[1] for arrow in found[1].split()}
        at: str | None = found[2]
        for _ in range(int(found[3])):
            at = None if at is None else target.get(at)
        return at is not None and answer.strip() == at

    def _question(self, target: npt.NDArray[np.int64], start: int, hops: int) -> tuple[str, str]:
        end = start
        for _ in range(hops):
            end = int(target[end])
        return f"{SYMBOLS[start]}{hops}=", SYMBOLS[end]
