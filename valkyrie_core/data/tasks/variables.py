"""Variables that get their values from each other: which digit one of them has.

    c=3 a=7 k=c d=k+4: d=7

Every name is given a value once: a digit, what an earlier one has, or so much more, of which the
last digit counts. How many names lie between a question and a digit is how many hops it takes.
"""

from __future__ import annotations

import re
import string
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

NAMES = string.ascii_lowercase


class VariablesConfig(Config):
    """How many variables, and how far the asked one is from a digit."""

    type: Literal["variables"] = "variables"
    level_key: ClassVar[str] = "hops"
    variables: int = Field(default=8, ge=1, le=len(NAMES))
    """That are given a value."""
    hops: tuple[int, ...] = Field(default=(1, 2, 3, 4), min_length=1)
    """Assignments on the way from the asked variable to its digit, both included; the levels."""

    @model_validator(mode="after")
    def _hops_are_some(self) -> VariablesConfig:
        if min(self.hops) < 1 or max(self.hops) > self.variables:
            raise ValueError("hops are at least 1, and no more than variables")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The numbers of hops."""
        return tuple(sorted(set(self.hops)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One question; every row of names is as likely as another."""
        names = [NAMES[i] for i in draw.permutation(len(NAMES))[: self.variables]]
        chain = sorted(draw.permutation(self.variables)[:difficulty].tolist())
        values: list[int] = []
        lines: list[str] = []
        for place, name in enumerate(names):
            if place in chain:
                before = chain.index(place) - 1
                source = chain[before] if before >= 0 else None
            else:
                # what is not asked about looks the same
                source = int(draw.integers(-1, place))
                source = None if source < 0 else source
            digit = int(draw.integers(10))
            if source is None:
                values.append(digit)
                lines.append(f"{name}={digit}")
            elif draw.integers(2):
                values.append(values[source])
                lines.append(f"{name}={names[source]}")
            else:
                values.append((values[source] + digit) % 10)
                lines.append(f"{name}={names[source]}+{digit}")
        asked = chain[-1]
        text = " ".join(lines)
        question = f"{text}: {names[asked]}="
        return Example(question, str(values[asked]), difficulty, question)

    def holds(self, question: str, answer: str) -> bool:
        """Whether going back from the asked variable to a digit leads there."""
        found = re.fullmatch(r"((?:[a-z]=\S+ ?)+): ([a-z])=", question.strip())
        if found is None:
            return False
        given = dict(line.split("=", 1) for line in found[1].split())
        name, more = found[2], 0
        for _ in range(len(given)):
            step = re.fullmatch(r"(\d)|([a-z])(?:\+(\d))?", given.get(name, ""))
            if step is None:
                return False
            if step[1]:
                return answer.strip() == str((int(step[1]) + more) % 10)
            name, more = step[2], more + int(step[3] or 0)
        return False
