"""Word problems of groups: a row of elements, and what it comes to, one after the other.

    abfcd=e

The smallest tasks of tracking a state. Of parity a mirror is enough; S3 does not commute; A5 is no
chain of commuting ones, and so as hard as any finite state can be: what can't be done side by side
(Barrington 1989; Merrill et al. 2024, arXiv 2404.08819). In training what the row comes to is asked
after every element.
"""

from __future__ import annotations

import functools
import itertools
import string
from typing import ClassVar, Literal

import numpy as np

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example, Lengths

SYMBOLS = string.ascii_lowercase + string.ascii_uppercase + string.digits
Group = Literal["parity", "s3", "a5"]


class GroupConfig(Config):
    """Which group, and how long the rows are."""

    type: Literal["group"] = "group"
    level_key: ClassVar[str] = "lengths"
    group: Group = "parity"
    """parity: two elements. s3: all orders of three things, six elements. a5: the even orders of
    five things, sixty."""
    elements: Literal["all", "generators"] = "all"
    """What rows are made of: all elements, or two of which all others come."""
    lengths: Lengths = (32,)
    """Elements of a row; the levels of difficulty."""

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The lengths."""
        return tuple(sorted(set(self.lengths)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One row of elements, all alike likely."""
        products = _products(self.group)
        everything = list(range(len(products)))
        alphabet = everything if self.elements == "all" else _generators(self.group)
        elements = draw.choice(alphabet, size=difficulty)
        states = list(itertools.accumulate(elements.tolist(), lambda a, b: int(products[a][b])))
        row, told = ("".join(SYMBOLS[i] for i in indices) for indices in (elements, states))
        # the sign is what tells a row's end from one more element
        return Example(f"{row}=", told[-1], difficulty, row, labels=f"{told} ")

    def holds(self, question: str, answer: str) -> bool:
        """Whether the row comes to that, by carrying things about."""
        elements = dict(zip(SYMBOLS, _elements(self.group), strict=False))
        row = question.strip().removesuffix("=")
        if not row or any(symbol not in elements for symbol in row):
            return False
        things = tuple(range(len(elements[row[0]])))
        for symbol in row:
            things = tuple(things[i] for i in elements[symbol])
        return elements.get(answer.strip()) == things


@functools.cache
def _elements(group: Group) -> tuple[tuple[int, ...], ...]:
    """The group's elements as orders of things, the one that changes nothing first."""
    size = {"parity": 2, "s3": 3, "a5": 5}[group]
    orders = itertools.permutations(range(size))
    return tuple(order for order in orders if group != "a5" or _is_even(order))


def _generators(group: Group) -> list[int]:
    """A turn of all things, and a swap of two of them or of two pairs; of parity there are but
    two elements."""
    if group == "parity":
        return [0, 1]
    elements = _elements(group)
    swap = (1, 0, 2) if group == "s3" else (1, 0, 3, 2, 4)
    turn = (*range(1, len(swap)), 0)
    return [elements.index(turn), elements.index(swap)]


def _is_even(order: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(order, 2)) % 2 == 0


@functools.cache
def _products(group: Group) -> tuple[tuple[int, ...], ...]:
    """[first][second]: which element two of them come to."""
    elements = _elements(group)
    number = {element: i for i, element in enumerate(elements)}
    return tuple(
        tuple(number[tuple(first[i] for i in second)] for second in elements) for first in elements
    )
