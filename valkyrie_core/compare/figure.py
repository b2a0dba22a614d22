"""comparison_plots.png: differences with their intervals, what they cost, and how they came about.

One column: it is read on a telephone, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np

from valkyrie_core.compare.curves import Curve
from valkyrie_core.report.comparison import ComparedMetric, CompareReport

_COLOURS = (
    *("#4c72b0", "#c44e52", "#55a868", "#8172b3"),
    *("#dd8452", "#937860", "#da8bc3", "#64b5cd"),
)
_STYLES, _MARKERS = ("-", "--", ":", "-."), "osD^"
"""When all colours are taken."""
_GRID, _ZERO, _SURE = "#e6e6e6", "#8c8c8c", "#c44e52"
_WIDTH, _HEIGHT, _ROW = 7.5, 3.5, 0.36
"""Inches: of the picture, of a panel, and of a row in the panel of differences."""
_DOTS = 120
EQUAL = 1.02
"""Costs that are so many times another are the same."""
MANY = 3
"""Designs; of more the single corpora are not drawn, nor the bands of seeds."""
_LINE = 80
"""Letters of a legend in a row."""
_FAR_APART = 8
"""Costs that differ by more are on a logarithmic axis."""


def draw_comparison(report: CompareReport, curves: Mapping[str, Sequence[Curve]]) -> bytes:
    """A PNG of one panel below the other: differences; right answers by difficulty, if questions
    were asked; scores by cost; curves by tokens, FLOPs and seconds."""
    # imported here: it costs half a second; the object interface, because pyplot wants a screen
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report, curves)
    with rc_context({"font.size": 12}):
        heights = [height for height, _ in panels]
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 1, gridspec_kw={"height_ratios": heights})
        for axis, (_, draw) in zip(axes, panels, strict=True):
            draw(axis)
            axis.grid(color=_GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        handles, labels = axes[-1].get_legend_handles_labels()
        if handles:
            columns = max(1, _LINE // (8 + max(map(len, labels))))
            place = "outside lower center"
            figure.legend(handles, labels, loc=place, ncols=columns, frameon=False)
        figure.suptitle(_title(report), fontsize=14)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=_DOTS, metadata={"Software": None})
    return buffer.getvalue()


def _panels(
    report: CompareReport, curves: Mapping[str, Sequence[Curve]]
) -> list[tuple[float, Callable[[Any], None]]]:
    """The height of every panel, and what draws it."""
    designs = {one.name: one for one in report.contenders}
    steps = {name: one.steps for name, one in designs.items()}
    seconds = report.timing.step_seconds
    prices = {
        "tokens": {name: one.tokens / one.steps for name, one in designs.items()},
        "training FLOPs": {name: one.training_flops / one.steps for name, one in designs.items()},
        "seconds of steps": dict(seconds),
    }
    spent = {
        title: {name: price[name] * steps[name] for name in designs}
        for title, price in prices.items()
        if title != "tokens"
    }
    found: list[tuple[float, Callable[[Any], None]]] = []
    many = len(designs) > MANY
    for unit in dict.fromkeys(one.unit for one in report.metrics):
        metrics = [one for one in report.metrics if one.unit == unit]
        if many:
            metrics = [one for one in metrics if one.name == unit]
        rows = 1.2 + _ROW * len(metrics)
        found.append((rows, partial(_differences, metrics, report.reference)))
    for corpus in report.contenders[0].accuracy:
        found.append((_HEIGHT, partial(_by_difficulty, report, corpus)))
    for corpus in dict.fromkeys(name for one in report.contenders for name in one.depths):
        found.append((_HEIGHT, partial(_by_depth, report, corpus)))
    for title, cost in spent.items():
        found.append((_HEIGHT, partial(_by_cost, report, title, cost)))
    for title, price in prices.items():
        found.append((_HEIGHT, partial(_curves, curves, title, price)))
    return found


def _title(report: CompareReport) -> str:
    seeds = f"{report.seeds} seed{'s' if report.seeds > 1 else ''}, equal {report.match}"
    if len(report.contenders) > 3:
        return f"{len(report.contenders)} designs: {seeds}"
    names = " against ".join(_label(one.name) for one in reversed(report.contenders))
    return f"{names}\n{seeds}"


def _look(number: int) -> dict[str, str]:
    """Colour, line and marker of a design."""
    again = number // len(_COLOURS) % len(_STYLES)
    colour = _COLOURS[number % len(_COLOURS)]
    return {"color": colour, "linestyle": _STYLES[again], "marker": _MARKERS[again]}


def _differences(metrics: Sequence[ComparedMetric], reference: str, axis: Any) -> None:
    """A row for every metric and contender, the first one on top."""
    shown = list(reversed(metrics))
    several = len({one.contender for one in metrics}) > 1
    for place, one in enumerate(shown):
        gap = one.difference
        sure = one.outcome != "not enough evidence"
        colour = _SURE if sure else _ZERO
        axis.plot(gap.value, place, "o" if sure else "D", color=colour)
        if gap.low is not None and gap.high is not None:
            axis.plot([gap.low, gap.high], [place, place], color=colour, linewidth=1.5)
    axis.axvline(0, color=_ZERO, linewidth=1)
    names = [_short(one) for one in shown]
    if several:
        alone = len({one.name for one in metrics}) == 1
        names = [
            one.contender if alone else f"{one.contender}, {name}"
            for one, name in zip(shown, names, strict=True)
        ]
    axis.set_yticks(range(len(shown)), [_label(name) for name in names])
    axis.set_ylim(-0.7, len(shown) - 0.3)
    known = any(one.difference.low is not None for one in metrics)
    title = "differences, 95 % intervals (red: sure)" if known else "differences, no intervals"
    axis.set_title(title, fontsize=12)
    axis.set_xlabel(f"{metrics[0].unit}, less {_label(reference)}'s")
    axis.locator_params(axis="x", nbins=5)
    axis.ticklabel_format(axis="x", useOffset=False)


def _short(metric: ComparedMetric) -> str:
    """A corpus, or everything: what is counted is said below."""
    return metric.name.removeprefix(metric.unit).removeprefix(": ") or "everything"


def _by_difficulty(report: CompareReport, corpus: str, axis: Any) -> None:
    """Accuracy by level, and what one answer for all would get."""
    for number, one in enumerate(report.contenders):
        levels = one.accuracy[corpus]
        label = _label(one.name)
        axis.plot(list(levels), list(levels.values()), label=label, **_look(number))
    for metric in report.metrics:
        if metric.constant_answer is not None and (
            metric.name == f"accuracy: {corpus}" or len(report.contenders[0].accuracy) == 1
        ):
            axis.axhline(metric.constant_answer, color=_ZERO, linewidth=1, linestyle="--")
            break
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks(list(report.contenders[0].accuracy[corpus]))
    axis.set_title(f"{_label(corpus)}: right answers (dashed: one answer for all)", fontsize=12)
    axis.set_xlabel("difficulty")
    axis.set_ylabel("accuracy")


def _by_depth(report: CompareReport, corpus: str, axis: Any) -> None:
    """Accuracy at every depth, and as bars where the design's own rule ends."""
    deep = [(n, one) for n, one in enumerate(report.contenders) if corpus in one.depths]
    ruled = [pair for pair in deep if pair[1].depths[corpus].ended]
    wide = 0.8 / max(1, len(ruled))
    for place, (number, one) in enumerate(ruled):
        ended = one.depths[corpus].ended
        left = [depth + (place - (len(ruled) - 1) / 2) * wide for depth in ended]
        colour = _look(number)["color"]
        axis.bar(left, list(ended.values()), width=wide, color=colour, alpha=0.3)
    for number, one in deep:
        own = one.depths[corpus].by_depth
        axis.plot(list(own), list(own.values()), label=_label(one.name), **_look(number))
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks(range(1, 1 + max(len(one.depths[corpus].by_depth) for _, one in deep)))
    bars = " (bars: ended by the rule)" if ruled else ""
    axis.set_title(f"{_label(corpus)}: right answers by depth{bars}", fontsize=12)
    axis.set_xlabel("loops or steps")
    axis.set_ylabel("share")


def _by_cost(report: CompareReport, title: str, cost: Mapping[str, float], axis: Any) -> None:
    """A point for every design, with the range of its seeds; a line joins the unbeaten ones."""
    unit = report.metrics[0].unit
    means = {one.name: float(np.mean(one.primary)) for one in report.contenders}
    for number, one in enumerate(report.contenders):
        look = {**_look(number), "linestyle": "none"}
        low, high = min(one.primary), max(one.primary)
        x, y = cost[one.name], means[one.name]
        axis.errorbar(
            x,
            y,
            yerr=[[y - low], [high - y]],
            capsize=4,
            label=_label(one.name),
            **look,
        )
    front = unbeaten(cost, means, lower_is_better=report.metrics[0].lower_is_better)
    if len(front) > 1:
        xs, ys = [cost[name] for name in front], [means[name] for name in front]
        axis.plot(xs, ys, color=_ZERO, linewidth=1, zorder=0)
    if max(cost.values()) > _FAR_APART * min(cost.values()):
        axis.set_xscale("log")
    else:
        axis.set_xlim(0, 1.08 * max(cost.values()))
    bars = "bars: seeds; " if report.seeds > 1 else ""
    axis.set_title(f"{unit} by cost ({bars}line: unbeaten)", fontsize=12)
    axis.set_xlabel(f"{title} of a training")
    axis.set_ylabel(unit)
    axis.ticklabel_format(axis="y", useOffset=False)


def unbeaten(
    cost: Mapping[str, float], score: Mapping[str, float], *, lower_is_better: bool
) -> list[str]:
    """The Pareto front, cheapest first: no other one is as cheap and better, or as good and
    cheaper. Costs that differ by rounding a number of steps are equal."""
    sign = 1 if lower_is_better else -1
    found: list[str] = []
    best = float("inf")
    for name in sorted(cost, key=lambda name: (cost[name], sign * score[name])):
        if sign * score[name] < best:
            if found and cost[name] < EQUAL * cost[found[-1]]:
                found.pop()
            found.append(name)
            best = sign * score[name]
    return found


def _curves(
    curves: Mapping[str, Sequence[Curve]], title: str, price: Mapping[str, float], axis: Any
) -> None:
    """Validations by what was spent."""
    band = len(curves) <= MANY
    for number, (name, own) in enumerate(curves.items()):
        _curve(axis, own, price[name], _label(name), _look(number), band=band)
    axis.set_title(f"validation by {title}" + " (band: seeds)" * band, fontsize=12)
    axis.set_xlabel(title)
    axis.set_ylabel("bits per byte")
    axis.ticklabel_format(axis="y", useOffset=False)


def _curve(
    axis: Any,
    curves: Sequence[Curve],
    price: float,
    label: str,
    look: dict[str, str],
    *,
    band: bool,
) -> None:
    """The mean over seeds, and between which values they lie."""
    whole = [curve for curve in curves if len(curve.steps_P)]
    if not whole:
        return
    # runs that were there before may have validated at other steps
    alike = [curve for curve in whole if np.array_equal(curve.steps_P, whole[0].steps_P)]
    x = whole[0].steps_P * price
    bits = np.stack([curve.bits_P for curve in alike])
    axis.plot(x, bits.mean(0), label=label, markersize=4, **look)
    if band:
        axis.fill_between(x, bits.min(0), bits.max(0), color=look["color"], alpha=0.2, linewidth=0)


def _label(name: str) -> str:
    """A name is text, not a formula."""
    return name.replace("$", r"\$")
