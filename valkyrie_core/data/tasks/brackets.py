"""Brackets of several kinds inside each other: what closes all that is open, innermost first.

    ({[]<=>})

The language of brackets (Dyck's) is what recursion in language is measured by; how many are open is
how much there is to remember, and for how long each is (Hewitt et al. 2020, arXiv 2010.07515). In
training the next closing bracket is asked for after every symbol.
"""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

PAIRS = ("()", "[]", "{}", "<>")


class BracketsConfig(Config):
    """How many brackets there are, and how many are open in the end."""

    type: Literal["brackets"] = "brackets"
    level_key: ClassVar[str] = "depths"
    length: int = Field(default=32, ge=1, le=1024)
    """Symbols of a row, or one less."""
    kinds: int = Field(default=4, ge=1, le=len(PAIRS))
    """Of brackets."""
    depths: tuple[int, ...] = Field(default=(2, 4, 8), min_length=1)
    """Brackets that are open in the end, and never more; the levels of difficulty."""

    @model_validator(mode="after")
    def _depths_are_reached(self) -> BracketsConfig:
        if min(self.depths) < 1 or max(self.depths) > self.length - 1:
            raise ValueError("depths are at least 1, and below the length")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The depths."""
        return tuple(sorted(set(self.depths)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One row; of all that rise and fall within the depth, each as likely as another."""
        length = self.length - (self.length - difficulty) % 2
        ways = _ways(length, difficulty)
        row, labels, closing = "", "", list[str]()
        for left in range(length, 0, -1):
            up = ways[left - 1][len(closing) + 1] / ways[left][len(closing)]
            if draw.random() < up:
                pair = PAIRS[int(draw.integers(self.kinds))]
                row += pair[0]
                closing.append(pair[1])
            else:
                row += closing.pop()
            labels += closing[-1] if closing else " "
        answer = "".join(reversed(closing))
        return Example(f"{row}=", answer, difficulty, row, labels=f"{labels} ")

    def holds(self, question: str, answer: str) -> bool:
        """Whether it closes all that is open, and nothing else."""
        row, sign, rest = question.strip().partition("=")
        if not sign or rest:
            return False
        text, before = row + answer.strip(), ""
        while text != before:
            before = text
            for pair in PAIRS:
                text = text.replace(pair, "")
        # what is answered closes alone
        opened = any(pair[0] in answer for pair in PAIRS)
        return not text and not opened


@functools.cache
def _ways(length: int, depth: int) -> tuple[tuple[int, ...], ...]:
    """[steps left][brackets open]: in how many ways rows end at the depth without passing it."""
    # whole numbers: there may be more ways than a float has room for
    now = [0] * (depth + 2)
    now[depth] = 1
    rows = [tuple(now)]
    for _ in range(length):
        now = [
            (rows[-1][at + 1] if at < depth else 0) + (rows[-1][at - 1] if at else 0)
            for at in range(depth + 1)
        ]
        rows.append((*now, 0))
    return tuple(rows)
