"""Nested modular expressions: sums, differences and products in brackets, modulo a small number.

    ((3+4)*(2-6))%7 = 0

or, with every bracket's result where the bracket ends,

    ((3+4)*(2-6))%7 = .....0.....30

The depth of the brackets is the number of steps that can't be done side by side.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

OPERATIONS = "+-*"


class ExpressionConfig(Config):
    """How deep, and modulo what."""

    type: Literal["expression"] = "expression"
    level_key: ClassVar[str] = "depths"
    modulus: int = Field(default=7, ge=2, le=10)
    """Results are digits below this."""
    depths: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Operations inside each other; the levels of difficulty."""
    answer: Literal["result", "brackets"] = "result"
    """What is asked for: the result alone, or a line as long as the expression with every
    bracket's result where that bracket ends, and dots elsewhere."""

    shape: Literal["tree", "chain"] = "tree"
    """Brackets on both sides of a sign, or on its left alone: `(((3+4)*2)-6)`."""

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
        """One question: one side of every operation is as deep as can be, the other less so."""
        text, results, value = self._tree(draw, difficulty)
        prompt = f"{text}%{self.modulus} = "
        answer = str(value) if self.answer == "result" else results
        return Example(prompt, answer, difficulty, prompt)

    def holds(self, question: str, answer: str) -> bool:
        """Whether that is what it comes to."""
        found = re.fullmatch(r"([-+*()\d]+)%(\d+) =", question.strip())
        if found is None or not int(found[2]):
            return False
        results = _results(found[1])
        if results is None:
            return False
        value, by_place = results
        modulus = int(found[2])
        if self.answer == "result":
            return answer.strip() == str(value % modulus)
        line = ["."] * len(found[1])
        for place, own in by_place.items():
            if found[1][place : place + 1] != ")":
                return False
            line[place] = str(own % modulus)
        return answer.strip() == "".join(line)

    def _tree(self, draw: np.random.Generator, depth: int) -> tuple[str, str, int]:
        """An expression, the results of its brackets under it, and its own."""
        if depth == 0:
            digit = int(draw.integers(self.modulus))
            return str(digit), ".", digit
        shallow = int(draw.integers(min(depth, 2))) if self.shape == "tree" else 0
        sides = [self._tree(draw, depth - 1), self._tree(draw, shallow)]
        if self.shape == "tree" and draw.integers(2):
            sides.reverse()
        (left, under_left, a), (right, under_right, b) = sides
        sign = OPERATIONS[int(draw.integers(len(OPERATIONS)))]
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] % self.modulus
        return f"({left}{sign}{right})", f".{under_left}.{under_right}{value}", value


_SIGNS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def _results(text: str) -> tuple[int, dict[int, int]] | None:
    """What an expression comes to, and what each of its operations does, by the place behind it;
    None where it is no expression. Nothing of it is ever run."""
    by_place: dict[int, int] = {}

    def of(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return of(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            assert node.end_col_offset is not None
            value = _SIGNS[type(node.op)](of(node.left), of(node.right))
            by_place[node.end_col_offset] = value
            return value
        raise ValueError(ast.dump(node))

    try:
        return of(ast.parse(text, mode="eval")), by_place
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
