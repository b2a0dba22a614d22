"""Small mazes: the way from S to E, as moves.

    #######
    # #  S#
    # # # #
    # # # #
    # # ###
    #E    #
    #######
    = LDDL

Between any two cells there is exactly one way (a spanning tree, by Wilson's algorithm, which draws
all of them with equal probability), so that there is one right answer.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
Cell = tuple[int, int]


class MazeConfig(Config):
    """How large."""

    type: Literal["maze"] = "maze"
    level_key: ClassVar[str] = "sizes"
    sizes: tuple[int, ...] = Field(default=(3, 4), min_length=1)
    """Cells of a side; the levels of difficulty."""

    @model_validator(mode="after")
    def _sizes_can_be(self) -> MazeConfig:
        if min(self.sizes) < 2 or max(self.sizes) > 12:
            raise ValueError("sizes are between 2 and 12")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The sizes."""
        return tuple(sorted(set(self.sizes)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One maze, from a random cell to another one; a move is one cell."""
        toward = spanning_tree(difficulty, draw)
        cells = [(r, c) for r in range(difficulty) for c in range(difficulty)]
        start, end = (cells[int(i)] for i in draw.choice(len(cells), 2, replace=False))
        picture = _picture(difficulty, toward, start, end)
        return Example(f"{picture}\n= ", way(toward, start, end), difficulty, picture)

    def holds(self, question: str, answer: str) -> bool:
        """Whether the moves lead from S to E, through no wall and nowhere twice."""
        rows = question.rstrip().removesuffix("=").rstrip("\n ").split("\n")
        places = {letter: (r, c) for r, row in enumerate(rows) for c, letter in enumerate(row)}
        at, moves = places.get("S"), answer.strip()
        if at is None or "E" not in places or not set(moves) <= MOVES.keys():
            return False
        been = {at}
        for move in moves:
            for _ in range(2):
                at = (at[0] + MOVES[move][0], at[1] + MOVES[move][1])
                inside = 0 <= at[0] < len(rows) and 0 <= at[1] < len(rows[at[0]])
                if not inside or rows[at[0]][at[1]] == "#":
                    return False
            if at in been:
                return False
            been.add(at)
        return at == places["E"]


def spanning_tree(size: int, draw: np.random.Generator) -> dict[Cell, Cell]:
    """For every cell but the first the next one towards it (Wilson 1996)."""
    toward: dict[Cell, Cell] = {}
    inside = {(0, 0)}
    for cell in ((r, c) for r in range(size) for c in range(size)):
        walk: dict[Cell, Cell] = {}
        at = cell
        while at not in inside:
            near = [(at[0] + dr, at[1] + dc) for dr, dc in MOVES.values()]
            near = [(r, c) for r, c in near if 0 <= r < size and 0 <= c < size]
            # going over a cell again forgets the loop
            walk[at] = near[int(draw.integers(len(near)))]
            at = walk[at]
        at = cell
        while at not in inside:
            toward[at] = walk[at]
            inside.add(at)
            at = walk[at]
    return toward


def way(toward: dict[Cell, Cell], start: Cell, end: Cell) -> str:
    """The moves from one cell to another."""

    def home(cell: Cell) -> list[Cell]:
        cells = [cell]
        while cells[-1] in toward:
            cells.append(toward[cells[-1]])
        return cells

    there, back = home(start), home(end)
    while len(there) > 1 and len(back) > 1 and there[-2] == back[-2]:
        there.pop()
        back.pop()
    cells = there + back[-2::-1]
    names = {step: name for name, step in MOVES.items()}
    return "".join(names[b[0] - a[0], b[1] - a[1]] for a, b in itertools.pairwise(cells))


def _picture(size: int, toward: dict[Cell, Cell], start: Cell, end: Cell) -> str:
    side = 2 * size + 1
    drawn = [["#"] * side for _ in range(side)]
    for r in range(size):
        for c in range(size):
            drawn[2 * r + 1][2 * c + 1] = " "
    for (r, c), (other_r, other_c) in toward.items():
        drawn[r + other_r + 1][c + other_c + 1] = " "
    for (r, c), name in ((start, "S"), (end, "E")):
        drawn[2 * r + 1][2 * c + 1] = name
    return "\n".join("".join(row) for row in drawn)
