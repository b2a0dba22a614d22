"""Questions about a small scene of coloured shapes: how many there are, and what is beside one.

    rc..bs
    ..gt..
    bc....
    : left gt=..    : count b=2    : below rc=..

A cell is empty or has a colour and a shape. The scene is shown as a grid of letters, which stands
in for its picture until a model reads pictures: `rendered` draws it, after CLEVR (Johnson et al.
2017, arXiv 1612.06890), which asks such questions about rendered scenes.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

COLOURS = {"r": (214, 39, 40), "g": (44, 160, 44), "b": (31, 119, 180), "y": (255, 187, 60)}
SHAPES = {"c": "circle", "s": "square", "t": "triangle"}
EMPTY = ".."
SIDES = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
Ask = Literal["count", "beside"]


class Scene(NamedTuple):
    """What stands where."""

    cells: tuple[tuple[str, ...], ...]
    """Row by row: a colour and a shape, or nothing."""

    @property
    def text(self) -> str:
        """A line for every row."""
        return "".join("".join(row) + "\n" for row in self.cells)


class SceneConfig(Config):
    """How large the scenes are, and what is asked."""

    type: Literal["scene"] = "scene"
    level_key: ClassVar[str] = "sizes"
    sizes: tuple[int, ...] = Field(default=(2, 3, 4), min_length=1)
    """Cells of a side; the levels of difficulty."""
    filled: float = Field(default=0.5, gt=0, lt=1)
    """The share of cells that have something, on average."""
    asks: tuple[Ask, ...] = Field(default=("count", "beside"), min_length=1)
    """count: things of a colour or a shape. beside: what is next to the only such thing."""

    @field_validator("sizes")
    @classmethod
    def _sizes_are_some(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 2 or max(sizes) > 8:
            raise ValueError("sizes are between 2 and 8")
        return sizes

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The sizes."""
        return tuple(sorted(set(self.sizes)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One scene and a question about it; things that are asked about by name come once."""
        ask = self.asks[int(draw.integers(len(self.asks)))]
        while True:
            scene = self._scene(draw, difficulty)
            things = [cell for row in scene.cells for cell in row if cell != EMPTY]
            named = [thing for thing in things if things.count(thing) == 1]
            if ask == "count" or named:
                break
        if ask == "count":
            quality = [*COLOURS, *SHAPES][int(draw.integers(len(COLOURS) + len(SHAPES)))]
            question, answer = f"count {quality}", str(sum(quality in thing for thing in things))
        else:
            side = list(SIDES)[int(draw.integers(len(SIDES)))]
            thing = named[int(draw.integers(len(named)))]
            question, answer = f"{side} {thing}", _beside(scene, thing, side)
        prompt = f"{scene.text}: {question}="
        # all that is asked of a scene is on one side of the split
        return Example(prompt, answer, difficulty, scene.text)

    def holds(self, question: str, answer: str) -> bool:
        """Whether the text of the grid says so, read as one row of characters."""
        row = "(?:[rgby.][cst.])+"
        found = re.fullmatch(rf"({row}(?:\n{row})*)\n: (\w+) (\w+)=", question.strip())
        if found is None:
            return False
        lines, asked, what = found[1].split("\n"), found[2], found[3]
        if len({len(line) for line in lines}) != 1:
            return False
        if asked == "count" and len(what) == 1:
            return answer.strip() == str(found[1].count(what))
        place = "\n".join(lines).find(what)
        if asked not in SIDES or len(what) != 2 or place < 0:
            return False
        # a step down is a line and its end
        width = len(lines[0]) + 1
        at = divmod(place, width)
        step = {"left": (0, -2), "right": (0, 2), "above": (-1, 0), "below": (1, 0)}[asked]
        line, column = at[0] + step[0], at[1] + step[1]
        inside = 0 <= line < len(lines) and 0 <= column < width - 1
        there = lines[line][column : column + 2] if inside else "wall"
        return answer.strip() == there

    def _scene(self, draw: np.random.Generator, size: int) -> Scene:
        colours, shapes = list(COLOURS), list(SHAPES)

        def cell() -> str:
            if draw.random() >= self.filled:
                return EMPTY
            colour = colours[int(draw.integers(len(colours)))]
            return colour + shapes[int(draw.integers(len(shapes)))]

        return Scene(tuple(tuple(cell() for _ in range(size)) for _ in range(size)))


def _beside(scene: Scene, thing: str, side: str) -> str:
    """What is there: a thing, nothing, or the wall."""
    row = next(i for i, cells in enumerate(scene.cells) if thing in cells)
    column = scene.cells[row].index(thing)
    row, column = row + SIDES[side][0], column + SIDES[side][1]
    size = len(scene.cells)
    return scene.cells[row][column] if 0 <= row < size and 0 <= column < size else "wall"


def rendered(scene: Scene, *, cell: int = 16) -> npt.NDArray[np.uint8]:
    """The picture [3, H, W] in RGB, on white, so many pixels a cell."""
    size = len(scene.cells)
    picture = np.full((3, size * cell, size * cell), 255, dtype=np.uint8)
    # from -1 to 1 over a cell, at the middles of pixels
    y, x = np.mgrid[:cell, :cell] * (2 / cell) + (1 / cell - 1)
    masks = {
        "c": x**2 + y**2 < 0.5,
        "s": np.maximum(abs(x), abs(y)) < 0.65,
        "t": (y < 0.65) & (2 * abs(x) < y + 0.75),
    }
    for i, row in enumerate(scene.cells):
        for j, thing in enumerate(row):
            if thing != EMPTY:
                part = picture[:, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
                part[:, masks[thing[1]]] = np.array(COLOURS[thing[0]], dtype=np.uint8)[:, None]
    return picture


def read_scene(text: str) -> Scene:
    """The scene that a text shows. ValueError where it shows none."""
    lines = text.strip().split("\n")
    for line in lines:
        if not re.fullmatch(r"(?:\.\.|[rgby][cst])+", line) or len(line) != 2 * len(lines):
            raise ValueError(f"{line!r} is no row of {len(lines)} cells")
    return Scene(tuple(tuple(re.findall("..", line)) for line in lines))
