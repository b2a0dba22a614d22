"""curves.png: what training did, on one page."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from valkyrie_core.train.metrics import Row

_COLOURS = ("#c44e52", "#dd8452", "#8172b3", "#55a868", "#937860")
_TRAIN, _RATE, _GRID = "#4c72b0", "#8c8c8c", "#e6e6e6"


def draw_curves(rows: list[Row], *, title: str) -> bytes:
    """A PNG of training loss, validation bits per byte and learning rate over the steps."""
    # imported here: it costs half a second, which chatting and evaluating need not pay;
    # the object interface and no pyplot, because pyplot keeps global state and wants a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "val"]
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    # parse_math: a run's name is text, whatever dollar signs it holds
    top.set_title(title, loc="left", fontsize=13, parse_math=False)
    _line(top, train, [row["loss"] for row in train], "training loss", _TRAIN)
    top.set_ylabel("nats per token")
    names = list(validation[-1]["bpb_by_corpus"]) if validation else []
    for i, name in enumerate(names):
        values = [row["bpb_by_corpus"].get(name) for row in validation]
        colour = _COLOURS[i % len(_COLOURS)]
        _line(middle, validation, values, f"validation: {name}", colour, marker="o")
    middle.set_ylabel("bits per byte")
    _line(bottom, train, [row["lr_scale"] for row in train], "", _RATE)
    bottom.set_ylim(0, 1.05)
    bottom.set_ylabel("learning rate\n(share of peak)")
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, middle, bottom):
        axes.grid(color=_GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right", frameon=False)
    buffer = BytesIO()
    # no software or date in the file: equal metrics give equal bytes
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _line(
    axes: Any, rows: list[Row], values: list[Any], label: str, colour: str, marker: str = ""
) -> None:
    """One curve; its newest value stands in the legend."""
    if not rows:
        return
    newest = f", {values[-1]:.3f}" if label and values[-1] is not None else ""
    label = label.replace("$", r"\$")  # a corpus's name is text, not a formula
    axes.plot(
        [row["step"] for row in rows],
        values,
        color=colour,
        linewidth=1.5,
        marker=marker,
        markersize=3.5,
        label=label + newest if label else None,
    )
