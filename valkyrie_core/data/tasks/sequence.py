"""Rows of letters to be copied, reversed or sorted.

    copy fbcab=fbcab    reverse fbcab=bacbf    sort fbcab=abbcf

The simplest things to do with what was read: to say it again, from its end, or in order.
"""

from __future__ import annotations

import itertools
import string
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example, Lengths

LETTERS = string.ascii_lowercase
Operation = Literal["copy", "reverse", "sort"]


class SequenceConfig(Config):
    """What is done, and to how many letters."""

    type: Literal["sequence"] = "sequence"
    level_key: ClassVar[str] = "lengths"
    operation: Operation = "copy"
    """copy: the same row. reverse: from its end. sort: in the order of the alphabet."""
    symbols: int = Field(default=len(LETTERS), ge=2, le=len(LETTERS))
    """Letters that there are, from a on."""
    lengths: Lengths = (4, 8, 16)
    """Letters of a row; the levels of difficulty."""

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The lengths."""
        return tuple(sorted(set(self.lengths)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One row, all letters alike likely."""
        row = "".join(LETTERS[i] for i in draw.integers(self.symbols, size=difficulty))
        answers = {"copy": row, "reverse": row[::-1], "sort": "".join(sorted(row))}
        prompt = f"{self.operation} {row}="
        # a row is on one side of the split, whatever is done to it
        return Example(prompt, answers[self.operation], difficulty, row)

    def holds(self, question: str, answer: str) -> bool:
        """Whether that was done to the row, letter by letter."""
        operation, _, row = question.strip().removesuffix("=").partition(" ")
        said = answer.strip()
        if not question.strip().endswith("=") or not row or len(said) != len(row):
            return False
        if operation == "sort":
            rises = all(a <= b for a, b in itertools.pairwise(said))
            return rises and all(said.count(letter) == row.count(letter) for letter in set(row))
        if operation == "reverse":
            return all(said[i] == row[len(row) - 1 - i] for i in range(len(row)))
        return operation == "copy" and said == row
