"""Experts against recursion in one picture: where something is to be worked out, and where not.

    python -m benchmarks.panels

Reads the summaries of the comparisons that stand in docs/comparisons, and draws every score of
every seed beside its mean. Nothing is trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from benchmarks import result

FOLDER = result.ROOT / "docs" / "comparisons"
PICTURE = FOLDER / "experts_and_recursion.png"
_EXPERTS, _RECURSION = "#4c72b0", "#c44e52"
_GRID = "#e6e6e6"


class Panel(NamedTuple):
    """One comparison of two designs."""

    title: str
    comparison: str
    """Its folder."""
    recursive: str
    """The design that is not the mixture of experts."""


PANELS = (
    Panel("arrows to follow", "baseline_vs_recursive", "recursive"),
    Panel("sudokus of 6 x 6", "canvas_vs_sudoku_moe_equal_flops", "canvas"),
    Panel("Shakespeare", "plays_moe_vs_plays_looped_equal_flops", "plays-looped"),
)
_EQUAL = {"flops": "training FLOPs", "params": "parameters"}


def main() -> int:
    """Draws those that are there."""
    found = [
        (panel, json.loads(path.read_text(encoding="utf-8")))
        for panel in PANELS
        if (path := FOLDER / panel.comparison / "comparison_summary.json").exists()
    ]
    if not found:
        print("there is no comparison yet: docs/reasoning.md names the commands", file=sys.stderr)
        return 1
    PICTURE.write_bytes(draw(found))
    return 0


def draw(found: Sequence[tuple[Panel, Mapping[str, Any]]]) -> bytes:
    """A PNG of one panel beside the other."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 11}):
        figure = Figure(figsize=(3.6 * len(found), 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, (panel, summary) in zip(axes, found, strict=True):
            _panel(axis, panel, summary)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axis: Any, panel: Panel, summary: Mapping[str, Any]) -> None:
    metric = summary["metrics"][0]
    designs = summary["contenders"]
    exact = metric["unit"] != "bits per byte"
    for place, design in enumerate(designs):
        colour = _RECURSION if design["name"] == panel.recursive else _EXPERTS
        scores = design["primary"]
        mean = sum(scores) / len(scores)
        axis.plot([place] * len(scores), scores, "o", color=colour, alpha=0.6)
        axis.hlines(mean, place - 0.25, place + 0.25, color=colour, linewidth=2.5)
        axis.annotate(
            f"{mean:.1%}" if exact else f"{mean:.3f}",
            (place + 0.3, mean),
            va="center",
            color=colour,
        )
    axis.set_xlim(-0.5, len(designs) - 0.1)
    if exact:
        axis.set_ylim(0, 1.03)
    sizes = [f"{one['name']}\n{one['parameters'] / 1000:,.0f}k weights" for one in designs]
    axis.set_xticks(range(len(designs)), sizes)
    better = "lower" if metric["lower_is_better"] else "higher"
    axis.set_ylabel(f"{metric['unit']} ({better} is better)")
    seeds = len(designs[0]["primary"])
    equal = _EQUAL.get(summary["match"], summary["match"])
    axis.set_title(f"{panel.title}\nequal {equal}, {seeds} seeds", fontsize=11)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    raise SystemExit(main())
