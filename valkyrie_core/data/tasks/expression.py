"""Nested modular expressions: sums, differences and products in brackets, modulo a small number.

    ((3+4)*(2-6))%7 = 0

The depth of the brackets is the number of steps that can't be done side by side.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

OPERATIONS = "+-*"


class ExpressionConfig(Config):
    """How deep, and modulo what."""

    type: Literal["expression"] = "expression"
    modulus: int = Field(default=7, ge=2, le=10)
    """Results are digits below this."""
    depths: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Operations inside each other; the levels of difficulty."""

    @model_validator(mode="after")
    def _depths_are_some(self) -> ExpressionConfig:
        if min(self.depths) < 1 or max(self.depths) > 8:
            raise ValueError("depths are between 1 and 8")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The depths."""
        return tuple(sorted(set(self.depths)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One question: one side of every operation is as deep as can be, the other one less so."""
        text, value = self._tree(draw, difficulty)
        prompt = f"{text}%{self.modulus} = "
        return Example(prompt, str(value), difficulty, prompt)

    def _tree(self, draw: np.random.Generator, depth: int) -> tuple[str, int]:
        if depth == 0:
            digit = int(draw.integers(self.modulus))
            return str(digit), digit
        shallow = int(draw.integers(min(depth, 2)))
        sides = [self._tree(draw, depth - 1), self._tree(draw, shallow)]
        if draw.integers(2):
            sides.reverse()
        (left, a), (right, b) = sides
        sign = OPERATIONS[int(draw.integers(len(OPERATIONS)))]
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] % self.modulus
        return f"({left}{sign}{right})", value
