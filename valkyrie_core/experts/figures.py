"""experts.png and experts_over_time.png: loads and knock-outs as heat maps.

Shapes: L layers, E experts, S logged steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np

from valkyrie_core.experts.history import History
from valkyrie_core.experts.measures import Floats
from valkyrie_core.report.experts import ExpertsReport

MOST_PANELS = 5
"""Domains that have a heat map of their own."""
MOST_WRITTEN = 16
"""Experts of a layer, up to which numbers stand in the cells."""
MOST_INCHES = 9.0
"""Height of a heat map, and half of its width, at most."""
COLUMNS = 3
"""Layers beside each other, over time."""


def draw_experts(report: ExpertsReport) -> bytes:
    """A PNG: load over ideal by layer and expert, and the knock-outs of each domain."""
    # imported here: it costs half a second
    from matplotlib.colors import TwoSlopeNorm

    panels = _knock_outs(report)
    widest = max(layer.num_experts for layer in report.layers)
    height = min(MOST_INCHES, 1.6 + 0.42 * len(report.layers))
    width = min(2 * MOST_INCHES, max(6.0, 2.5 + 0.55 * widest))
    figure, axes = _grid(1 + len(panels), 1, (width, height))
    loads_LE = _matrix([layer.load for layer in report.layers], widest)
    most = max(2.0, float(np.nanmax(loads_LE, initial=0.0)))
    title = f"{report.run}, step {report.step}: load over a fair one"
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
    _heat(axes[0], loads_LE, report, title, cmap="PuOr_r", norm=norm, form="{:.2f}")
    # one scale for all domains, or colours would not compare
    reach = max((float(np.nanmax(np.abs(x_LE), initial=0.0)) for _, x_LE in panels), default=0.0)
    for axis, (name, change_LE) in zip(axes[1:], panels, strict=True):
        norm = TwoSlopeNorm(vmin=-max(reach, 1e-9), vcenter=0, vmax=max(reach, 1e-9))
        title = f"{name}: nats per token that the loss rises by without it"
        _heat(axis, change_LE, report, title, cmap="RdBu_r", norm=norm, form="{:.3f}")
    axes[-1].set_xlabel("expert")
    return _png(figure)


def draw_over_time(name: str, history: dict[int, History]) -> bytes | None:
    """A PNG of every layer's loads by expert and step of training; None: too little is logged."""
    from matplotlib.colors import TwoSlopeNorm

    shown = {layer: one for layer, one in history.items() if len(one.steps_S) > 1}
    if not shown:
        return None
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = _grid(rows, columns, (4.2 * columns + 0.8, 2.4 * rows + 0.6))
    most = max(2.0, *(float(one.share_SE.max()) for one in shown.values()))
    image = None
    for axis, (layer, one) in zip(axes, shown.items(), strict=False):
        experts = np.arange(one.share_SE.shape[1])
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
        image = axis.pcolormesh(
            one.steps_S, experts, one.share_SE.T, cmap="PuOr_r", norm=norm, shading="nearest"
        )
        axis.set_title(f"layer {layer}", loc="left", fontsize=10)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.invert_yaxis()
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.suptitle(f"{name}: load over a fair one, by step and expert", parse_math=False)
    figure.supxlabel("step")
    figure.supylabel("expert")
    figure.colorbar(image, ax=axes, shrink=0.6)
    return _png(figure)


def _knock_outs(report: ExpertsReport) -> list[tuple[str, Floats]]:
    """(title, [L, E]) of every domain; of many domains, their mean."""
    widest = max(layer.num_experts for layer in report.layers)
    rows = [layer.knock_out or [] for layer in report.layers]
    names = [domain.name for domain in report.domains]
    panels = [
        (name, _matrix([_of(name, own) for own in rows], widest))
        for name in names
        if any(_of(name, own) for own in rows)
    ]
    if len(panels) > MOST_PANELS:
        return [(f"mean of {len(panels)} domains", np.mean([x_LE for _, x_LE in panels], axis=0))]
    return panels


def _of(name: str, rows: Sequence[Any]) -> list[float] | None:
    return next((row.change for row in rows if row.domain == name), None)


def _matrix(rows: Sequence[Sequence[float] | None], width: int) -> Floats:
    matrix_LE = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        if row is not None:
            matrix_LE[index, : len(row)] = row
    return matrix_LE


def _grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    # the object interface, because pyplot wants a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = size
    if columns == 1:
        height *= rows
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _heat(
    axis: Any,
    matrix_LE: Floats,
    report: ExpertsReport,
    title: str,
    *,
    cmap: str,
    norm: Any,
    form: str,
) -> None:
    image = axis.imshow(matrix_LE, cmap=cmap, norm=norm, aspect="auto")
    axis.set_title(title, loc="left", fontsize=10, parse_math=False)
    axis.set_ylabel("layer")
    axis.set_yticks(range(len(report.layers)), [str(layer.layer) for layer in report.layers])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.figure.colorbar(image, ax=axis)
    if matrix_LE.shape[1] > MOST_WRITTEN:
        return
    for (row, column), value in np.ndenumerate(matrix_LE):
        if not math.isnan(value):
            dark = abs(float(norm(value)) - 0.5) > 0.35
            axis.text(
                column,
                row,
                form.format(value),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
