"""curves.png: what training did, on one page."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from valkyrie_core.train.metrics import Row

_TRAIN, _VALIDATION, _RATE, _GRID = "#4c72b0", "#c44e52", "#8c8c8c", "#e6e6e6"


def draw_curves(rows: list[Row], *, title: str) -> bytes:
    """A PNG of loss and validation bits per byte over the steps, the learning rate below."""
    # imported here: it costs half a second, which chatting and evaluating need not pay;
    # the object interface and no pyplot, because pyplot keeps global state and wants a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "val"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.set_title(title, loc="left", fontsize=12)
    lines = above.plot(
        [row["step"] for row in train],
        [row["loss"] for row in train],
        color=_TRAIN,
        linewidth=1.4,
        label="training loss",
    )
    above.set_ylabel("training loss (nats per token)", color=_TRAIN)
    if validation:
        lines += _draw_validation(above.twinx(), validation)
    if lines:
        above.legend(handles=lines, loc="upper right", frameon=False)
    below.plot(
        [row["step"] for row in train],
        [row["lr_scale"] for row in train],
        color=_RATE,
        linewidth=1.4,
    )
    below.set_ylim(0, 1.05)
    below.set_ylabel("learning rate\n(share of peak)")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(color=_GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    # no software or date in the file: equal metrics give equal bytes
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _draw_validation(axes: Any, rows: list[Row]) -> list[Any]:
    """One line per corpus, the newest value written at its end."""
    lines = []
    steps = [row["step"] for row in rows]
    names = list(rows[-1]["bpb_by_corpus"])
    styles = ("-", "--", ":", "-.")
    for i, name in enumerate(names):
        values = [row["bpb_by_corpus"].get(name) for row in rows]
        lines += axes.plot(
            steps,
            values,
            color=_VALIDATION,
            linestyle=styles[i % len(styles)],
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            label=f"validation: {name}",
        )
        if values[-1] is not None:
            axes.annotate(
                f"{values[-1]:.3f}",
                (steps[-1], values[-1]),
                textcoords="offset points",
                xytext=(-4, 7),
                ha="right",
                fontsize=9,
                color=_VALIDATION,
            )
    axes.set_ylabel("validation (bits per byte)", color=_VALIDATION)
    axes.spines[["top", "left"]].set_visible(False)
    return lines
