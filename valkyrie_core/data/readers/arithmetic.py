"""The corpus `arithmetic`: sums, differences and products that are made, not found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.cache import fingerprint
from valkyrie_core.data.documents import Document, Drops, text_document
from valkyrie_core.data.formats import TextFormat

VERSION = 1
"""Of the text that is made from a description."""


class ProblemsHoldout(Config):
    """Holds out problems, not documents: what validation asks, training never shows."""

    type: Literal["problems"] = "problems"
    fraction: float = Field(default=0.1, gt=0, lt=1)
    """The share of all problems that validation alone asks, chosen by a hash of each."""

    def holds(self, problem: str) -> bool:
        """Whether validation alone asks this problem."""
        digest = hashlib.sha256(problem.encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.fraction * 2.0**64


class ArithmeticCorpus(Config):
    """Documents of lines such as `37 + 5 = 42`, from a seed."""

    type: Literal["arithmetic"] = "arithmetic"
    documents: int = Field(default=2000, ge=1)
    """Training documents."""
    lines: int = Field(default=16, ge=1)
    """Problems of a document."""
    digits: int = Field(default=2, ge=1, le=6)
    """Digits of an operand, at most."""
    operations: tuple[Literal["+", "-", "*"], ...] = Field(default=("+", "-"), min_length=1)
    """What is asked."""
    seed: int = Field(default=0, ge=0)
    """Another seed, other problems."""
    format: TextFormat = TextFormat()
    """Always text."""
    holdout: ProblemsHoldout = ProblemsHoldout()
    """Which problems are kept for validation; a twentieth as many documents."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""

    def digest(self, cache: Path) -> str:
        """A hash of the description: the text follows from it."""
        return fingerprint([VERSION, self.model_dump(mode="json", exclude={"weight"})])

    def read(self, cache: Path, drops: Drops) -> tuple[list[Document], list[Document]]:
        """Training documents, and those of validation with problems of their own."""
        return (
            list(self._documents("train", self.documents, held=False)),
            list(self._documents("validation", max(1, self.documents // 20), held=True)),
        )

    def _documents(self, name: str, count: int, *, held: bool) -> Iterator[Document]:
        for index in range(count):
            problems = self._problems(index, held=held)
            lines = [next(problems) for _ in range(self.lines)]
            yield text_document(f"{name}/{index:06d}", "\n".join(lines) + "\n")

    def _problems(self, index: int, *, held: bool) -> Iterator[str]:
        # a generator for every document: another number of them moves none
        draw = np.random.default_rng([self.seed, index, int(held)])
        while True:
            left, right = (
                int(draw.integers(10 ** int(draw.integers(1, self.digits + 1)))) for _ in "ab"
            )
            sign = self.operations[int(draw.integers(len(self.operations)))]
            problem = f"{left} {sign} {right}"
            if self.holdout.holds(problem) == held:
                answer = {"+": left + right, "-": left - right, "*": left * right}[sign]
                yield f"{problem} = {answer}"
