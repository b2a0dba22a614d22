"""Sudoku of 4 x 4 or 6 x 6, every puzzle with exactly one solution.

    ...3/2.4./.132/32.. = 1423/2341/4132/3214

Held out are solved grids, not puzzles: what training has solved is not asked with other blanks.
"""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

BOXES = {4: (2, 2), 6: (2, 3)}
"""Rows and columns of a box, by the size of the grid."""
Grid = list[int]
"""Row after row; 0 is blank."""
TRIES = 200
"""Grids that are drawn for one puzzle with so many blanks."""


class SudokuConfig(Config):
    """How large, and how many blanks."""

    type: Literal["sudoku"] = "sudoku"
    level_key: ClassVar[str] = "blanks"
    size: Literal[4, 6] = 4
    """Rows, columns and numbers."""
    blanks: tuple[int, ...] = Field(default=(4, 6, 8), min_length=1)
    """Cells that are asked; the levels of difficulty."""

    @model_validator(mode="after")
    def _blanks_can_be(self) -> SudokuConfig:
        # nobody knows a 6 x 6 with fewer than 8 givens and one solution; of 4 x 4 four are needed
        most = {4: 12, 6: 27}[self.size]
        if min(self.blanks) < 1 or max(self.blanks) > most:
            raise ValueError(f"blanks of a {self.size} x {self.size} grid are between 1 and {most}")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The numbers of blanks."""
        return tuple(sorted(set(self.blanks)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One puzzle. Raises ValueError where so many blanks leave no single solution."""
        for _ in range(TRIES):
            grid = solved(self.size, draw)
            puzzle = self._emptied(grid, draw, difficulty)
            if puzzle is not None:
                answer = self._text(grid)
                return Example(f"{self._text(puzzle)} = ", answer, difficulty, answer)
        raise ValueError(f"no puzzle with {difficulty} blanks was found in {TRIES} grids")

    def holds(self, question: str, answer: str) -> bool:
        """Whether a grid is solved and has all that was given."""
        puzzle = self._grid(question.strip().removesuffix("=").strip())
        grid = self._grid(answer.strip())
        if puzzle is None or grid is None or 0 in grid:
            return False
        if any(given not in (0, number) for given, number in zip(puzzle, grid, strict=True)):
            return False
        # of a full grid: whether every cell has what no other one of its units has
        return num_solutions(grid, self.size, limit=1) == 1

    def _grid(self, text: str) -> Grid | None:
        rows = text.split("/")
        known = {".": 0, **{str(number): number for number in range(1, self.size + 1)}}
        fits = len(rows) == self.size and all(len(row) == self.size for row in rows)
        if not fits or not set("".join(rows)) <= known.keys():
            return None
        return [known[letter] for row in rows for letter in row]

    def _emptied(self, grid: Grid, draw: np.random.Generator, blanks: int) -> Grid | None:
        """Cells are emptied one by one where the solution stays the only one."""
        puzzle, left = list(grid), blanks
        for cell in draw.permutation(len(grid)).tolist():
            if not left:
                break
            kept, puzzle[cell] = puzzle[cell], 0
            if num_solutions(puzzle, self.size, limit=2) == 1:
                left -= 1
            else:
                puzzle[cell] = kept
        return None if left else puzzle

    def _text(self, grid: Grid) -> str:
        rows = [grid[i : i + self.size] for i in range(0, len(grid), self.size)]
        return "/".join("".join(str(x) if x else "." for x in row) for row in rows)


def solved(size: int, draw: np.random.Generator) -> Grid:
    """A full grid, filled cell by cell in a random order of numbers."""
    grid = [0] * size**2

    def fill(cell: int) -> bool:
        if cell == len(grid):
            return True
        for number in draw.permutation(size) + 1:
            if int(number) in allowed(grid, size, cell):
                grid[cell] = int(number)
                if fill(cell + 1):
                    return True
        grid[cell] = 0
        return False

    fill(0)
    return grid


def allowed(grid: Grid, size: int, cell: int) -> set[int]:
    """The numbers that no other cell of the row, the column and the box has."""
    rows, columns = BOXES[size]
    row, column = divmod(cell, size)
    top, left = row // rows * rows, column // columns * columns
    used = set(grid[row * size : (row + 1) * size]) | set(grid[column::size])
    for r in range(top, top + rows):
        used |= set(grid[r * size + left : r * size + left + columns])
    return set(range(1, size + 1)) - used


def num_solutions(puzzle: Grid, size: int, limit: int) -> int:
    """How many solutions there are, up to a limit: the cell with the fewest choices first."""
    # what a row, a column and a box have is one set of bits each: thousands of puzzles are drawn
    units = _units(size)
    used, blanks = [0] * (3 * size), []
    for cell, number in enumerate(puzzle):
        if not number:
            blanks.append(cell)
            continue
        for unit in units[cell]:
            if used[unit] >> number & 1:
                return 0
            used[unit] |= 1 << number
    whole = (1 << size + 1) - 2

    def count(found: int) -> int:
        fewest, place = size + 1, -1
        choices = 0
        for index, cell in enumerate(blanks):
            row, column, box = units[cell]
            free = whole & ~(used[row] | used[column] | used[box])
            if free.bit_count() < fewest:
                fewest, place, choices = free.bit_count(), index, free
                if fewest < 2:
                    break
        if place < 0:
            return found + 1
        cell = blanks.pop(place)
        row, column, box = units[cell]
        while choices and found < limit:
            bit = choices & -choices
            choices ^= bit
            for unit in (row, column, box):
                used[unit] |= bit
            found = count(found)
            for unit in (row, column, box):
                used[unit] ^= bit
        blanks.insert(place, cell)
        return found

    return count(0)


@functools.cache
def _units(size: int) -> list[tuple[int, int, int]]:
    """Of every cell: the numbers of its row, its column and its box among all of these."""
    rows, columns = BOXES[size]
    found = []
    for cell in range(size**2):
        row, column = divmod(cell, size)
        box = row // rows * (size // columns) + column // columns
        found.append((row, size + column, 2 * size + box))
    return found
