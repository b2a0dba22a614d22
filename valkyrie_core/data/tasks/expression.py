"""Nested modular expressions: sums, differences and products in brackets, modulo a small number.

    ((3+4)*(2-6))%7 = 0

The depth of the brackets is the number of steps that can't be done side by side.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
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

    def holds(self, question: str, answer: str) -> bool:
        """Whether that is what it comes to."""
        found = re.fullmatch(r"([-+*()\d]+)%(\d+) =", question.strip())
        if found is None or not int(found[2]):
            return False
        value = _value(found[1])
        return value is not None and answer.strip() == str(value % int(found[2]))

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


_SIGNS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def _value(text: str) -> int | None:
    """What an expression comes to; None where it is none. Nothing of it is ever run."""

    def of(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return of(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            return _SIGNS[type(node.op)](of(node.left), of(node.right))
        raise ValueError(ast.dump(node))

    try:
        return of(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
