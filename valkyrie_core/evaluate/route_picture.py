"""routes.png: which mixer every token of a text went through, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

IN_A_STRIP = 64
"""Tokens beside each other."""
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd")
NOTHING = "#d9d9d9"
"""Of a mixer that skips."""


class Row(NamedTuple):
    """One router's choices."""

    label: str
    likeliest: Sequence[str]
    """By token, the mixer's name."""


def draw_routes(
    title: str, tokens: Sequence[str], rows: Sequence[Row], skips: frozenset[str]
) -> bytes:
    """A PNG of strips of tokens, a row for every router.

    Args:
        skips: names of mixers that do nothing; they are drawn in grey.
    """
    # imported here: it costs half a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for row in rows for name in row.likeliest))
    working = [name for name in sorted(names) if name not in skips]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(working)}
    colours |= dict.fromkeys(skips & set(names), NOTHING)
    number = {name: i for i, name in enumerate(colours)}
    strips = [range(i, min(i + IN_A_STRIP, len(tokens))) for i in range(0, len(tokens), IN_A_STRIP)]
    height = 0.8 + len(strips) * (0.5 + 0.22 * len(rows))
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, strip in zip(axes, strips, strict=True):
        cells = np.full((len(rows), IN_A_STRIP), np.nan)
        for y, row in enumerate(rows):
            cells[y, : len(strip)] = [number[row.likeliest[t]] for t in strip]
        _strip(axis, cells, ListedColormap(list(colours.values())), len(colours))
        axis.set_xticks(
            range(len(strip)), [_short(tokens[t]) for t in strip], fontsize=7, family="monospace"
        )
        axis.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _strip(axis: Any, cells: Any, colours: Any, count: int) -> None:
    axis.imshow(
        cells, cmap=colours, vmin=-0.5, vmax=count - 0.5, aspect="auto", interpolation="nearest"
    )
    axis.set_xticks(np.arange(-0.5, cells.shape[1]), minor=True)
    axis.set_yticks(np.arange(-0.5, cells.shape[0]), minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _short(token: str) -> str:
    # a dollar would begin a formula
    return token[:4].replace("$", r"\$") if token.strip() else "␣"
