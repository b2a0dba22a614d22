"""The tables of `valkyrie compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from valkyrie_cli.render import human_count, human_seconds, make_table, safe_line

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import ComparedMetric, CompareReport


MANY = 3
"""Designs; of more the single corpora are on the page alone."""


def draw_comparison(report: CompareReport, console: Console) -> None:
    """The verdict, the designs, the differences, and the three ways to be equal."""
    console.print(safe_line(report.verdict), style="bold", soft_wrap=True)
    _draw_designs(report, console)
    _draw_differences(report, console)
    _draw_accuracy(report, console)
    _draw_views(report, console)
    for one in report.dropped:
        console.print(f"dropped: {safe_line(one.name)}, {safe_line(one.why)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"- {safe_line(note)}", soft_wrap=True)


def _draw_designs(report: CompareReport, console: Console) -> None:
    columns = ["design", "bits per byte", "parameters", "of a token", "steps", "FLOPs", "s/step"]
    asked = report.metrics[0].unit == "accuracy"
    if asked:
        columns.insert(1, "accuracy")
    table = make_table(*columns, right=columns[1:])
    for one in report.contenders:
        accuracy = [f"{sum(one.primary) / len(one.primary):.1%}"] if asked else []
        table.add_row(
            safe_line(one.name),
            *accuracy,
            f"{one.score:.4f}",
            human_count(float(one.parameters)),
            human_count(float(one.active_parameters)),
            f"{one.steps:,}",
            f"{one.training_flops:.3g}",
            f"{report.timing.step_seconds[one.name]:.3f}",
        )
    console.print(table)
    seeds = "one seed" if report.seeds == 1 else f"{report.seeds} seeds"
    console.print(f"Means over {seeds}; lower bits per byte are better.")


def _draw_differences(report: CompareReport, console: Console) -> None:
    columns = ["metric", "design", "difference", "95 %", "p", "would be found", "outcome"]
    table = make_table(*columns, right=["difference", "p", "would be found"])
    many = len(report.contenders) > MANY
    for one in report.metrics:
        if many and one.name != report.metrics[0].name:
            continue
        gap = one.difference
        table.add_row(
            safe_line(one.name),
            safe_line(one.contender),
            f"{gap.value:+.4f}",
            _interval(one),
            _number(gap.p_holm),
            _number(gap.detectable),
            one.outcome,
            style="bold" if one.outcome != "not enough evidence" else None,
        )
    console.print(table)
    console.print(
        f"Each less {safe_line(report.reference)}'s, over other seeds and other items; p "
        "after Holm's correction. Would be found: the smallest true difference that this "
        "comparison finds four times in five."
        + (" The single corpora are in comparison.md." if many else "")
    )


def _draw_accuracy(report: CompareReport, console: Console) -> None:
    """Right answers by level; nothing where no questions were asked."""
    for corpus, levels in report.contenders[0].accuracy.items():
        columns = [safe_line(corpus), *(f"level {level}" for level in levels)]
        table = make_table(*columns, right=columns[1:])
        for one in report.contenders:
            shares = (f"{share:.1%}" for share in one.accuracy[corpus].values())
            table.add_row(safe_line(one.name), *shares)
        console.print(table)


def _interval(one: ComparedMetric) -> str:
    gap = one.difference
    return "-" if gap.low is None or gap.high is None else f"{gap.low:+.4f} to {gap.high:+.4f}"


def _draw_views(report: CompareReport, console: Console) -> None:
    """A row for each design: many columns would not fit a terminal."""
    titles = {"params": "parameters", "flops": "FLOPs", "seconds": "seconds"}
    table = make_table("", *(titles[key] for key in report.views), right=list(titles.values()))
    table.add_row("equal", *("yes" if view.matched else "no" for view in report.views.values()))
    for one in report.contenders:
        table.add_row(
            safe_line(one.name),
            human_count(float(one.parameters)),
            human_count(float(one.training_flops)),
            human_seconds(report.timing.step_seconds[one.name] * one.steps),
        )
    for one in report.contenders[1:]:
        gaps = [
            report.timing.difference_at_equal_seconds.get(one.name)
            if key == "seconds"
            else view.difference_at_equal.get(one.name)
            for key, view in report.views.items()
        ]
        told = ["-" if gap is None else f"{gap:+.4f}" for gap in gaps]
        table.add_row(f"{safe_line(one.name)}, bits", *told)
    console.print(table)
    console.print(
        f"Bits per byte less {safe_line(report.reference)}'s; what is not equal is read off the "
        "curves, where both had spent as much, and the one that is cut short there had not "
        "finished its schedule."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
