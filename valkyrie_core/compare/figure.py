"""comparison_plots.png: curves with their seeds, costs, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from valkyrie_core.compare.curves import Curve
from valkyrie_core.report.comparison import ComparedMetric, CompareReport

_COLOURS = ("#4c72b0", "#c44e52", "#55a868", "#8172b3", "#dd8452", "#937860")
_GRID, _ZERO = "#e6e6e6", "#8c8c8c"


def draw_comparison(report: CompareReport, curves: Mapping[str, Sequence[Curve]]) -> bytes:
    """A PNG of four panels: loss by tokens, by FLOPs and by seconds, and every difference."""
    # imported here: it costs half a second; the object interface, because pyplot wants a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    asked = list(report.contenders[0].accuracy)
    rows = 2 + -(-len(asked) // 2)
    figure = Figure(figsize=(11, 4.25 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2).flatten()
    designs = {one.name: one for one in report.contenders}
    panels = {
        "tokens": {name: one.tokens / one.steps for name, one in designs.items()},
        "training FLOPs": {name: one.training_flops / one.steps for name, one in designs.items()},
        "seconds of steps": dict(report.timing.step_seconds),
    }
    for axis, (title, price) in zip(axes, panels.items(), strict=False):
        for number, (name, own) in enumerate(curves.items()):
            _band(axis, own, price[name], _label(name), _COLOURS[number % len(_COLOURS)])
        axis.set_xlabel(title)
        axis.set_ylabel("validation bits per byte")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    _differences(axes[3], report.metrics, report.reference)
    for axis, corpus in zip(axes[4:], asked, strict=False):
        _by_difficulty(axis, report, corpus)
    if len(asked) % 2:
        axes[-1].set_visible(False)
    for axis in axes:
        axis.grid(color=_GRID, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    names = " against ".join(_label(one.name) for one in reversed(report.contenders))
    figure.suptitle(
        f"{names}: {report.seeds} seed{'s' if report.seeds > 1 else ''}, equal {report.match}",
        fontsize=13,
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _band(axis: Any, curves: Sequence[Curve], price: float, label: str, colour: str) -> None:
    """The mean over seeds, and between which values they lie."""
    whole = [curve for curve in curves if len(curve.steps_P)]
    if not whole:
        return
    # runs that were there before may have validated at other steps
    alike = [curve for curve in whole if np.array_equal(curve.steps_P, whole[0].steps_P)]
    x = whole[0].steps_P * price
    bits = np.stack([curve.bits_P for curve in alike])
    axis.plot(x, bits.mean(0), color=colour, label=label, marker="o", markersize=3)
    axis.fill_between(x, bits.min(0), bits.max(0), color=colour, alpha=0.2, linewidth=0)


def _differences(axis: Any, metrics: Sequence[ComparedMetric], reference: str) -> None:
    """A row for every metric and contender, the first one on top."""
    shown = list(reversed(metrics))
    several = len({one.contender for one in metrics}) > 1
    for place, one in enumerate(shown):
        gap = one.difference
        sure = one.outcome != "not enough evidence"
        axis.plot(gap.value, place, "o" if sure else "D", color=_COLOURS[1] if sure else _ZERO)
        if gap.low is not None and gap.high is not None:
            colour = _COLOURS[1] if sure else _ZERO
            axis.plot([gap.low, gap.high], [place, place], color=colour, linewidth=1.5)
    axis.axvline(0, color=_ZERO, linewidth=1)
    names = [one.name for one in shown]
    if several:
        names = [f"{one.contender}: {name}" for one, name in zip(shown, names, strict=True)]
    axis.set_yticks(range(len(shown)), [_label(name) for name in names])
    axis.set_ylim(-0.7, len(shown) - 0.3)
    units = sorted({one.unit for one in metrics}, reverse=True)
    told = " and ".join(units)
    axis.set_xlabel(f"{told}, less {_label(reference)}'s; 95 % intervals")


def _by_difficulty(axis: Any, report: CompareReport, corpus: str) -> None:
    """Accuracy by level, and what one answer for all would get."""
    for number, one in enumerate(report.contenders):
        levels = one.accuracy[corpus]
        colour = _COLOURS[number % len(_COLOURS)]
        axis.plot(list(levels), list(levels.values()), "o-", color=colour, label=_label(one.name))
    for metric in report.metrics:
        if metric.constant_answer is not None and (
            metric.name == f"accuracy: {corpus}" or len(report.contenders[0].accuracy) == 1
        ):
            axis.axhline(metric.constant_answer, color=_ZERO, linewidth=1, linestyle="--")
            break
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks(list(report.contenders[0].accuracy[corpus]))
    axis.set_xlabel(f"{_label(corpus)}: difficulty (dashed: one answer for all)")
    axis.set_ylabel("accuracy")
    axis.legend(frameon=False)


def _label(name: str) -> str:
    """A name is text, not a formula."""
    return name.replace("$", r"\$")
