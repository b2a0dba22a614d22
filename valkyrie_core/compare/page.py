"""comparison.md: the verdict in words, on one page."""

from __future__ import annotations

from collections.abc import Sequence

from valkyrie_core.report.comparison import ComparedMetric, CompareReport

MOST_COLUMNS = 3
"""Designs of which each has a column; of more each has a row: a telephone is narrow."""


def comparison_page(report: CompareReport, picture: str, command: str) -> str:
    """The page in Markdown.

    Args:
        picture: the file of the plots, beside the page.
        command: what makes the page again.
    """
    names = [one.name for one in report.contenders]
    title = " against ".join(reversed(names))
    if len(names) > MOST_COLUMNS:
        title = f"{len(names) - 1} designs against {report.reference}"
    lines = [
        f"# {title}",
        "",
        f"**{report.verdict}**",
        "",
        "## The differences",
        "",
        f"Each less `{report.reference}`'s: fewer bits and more right answers are better. "
        "Intervals are 95 %, over other seeds and other items; the first metric is tested by "
        "itself, the others together: p after Holm's correction within each. The effect size is "
        "the difference over the spread of the seeds' differences.",
        "",
        *_differences(report),
        "",
        *(f"- {line}" for line in _drivers(report)),
        "",
        *_accuracies(report),
        *_depths(report),
        "## The designs",
        "",
        *_designs(report),
        "",
        *_dropped(report),
        "## Equal in what?",
        "",
        *_views(report),
        "",
        "## Curves and costs",
        "",
        f"![differences, scores by cost, and curves]({picture})",
        "",
    ]
    if report.notes:
        lines += ["## What to know", "", *(f"- {note}" for note in report.notes), ""]
    timing, first = report.timing, report.contenders[0]
    seeds = ", ".join(map(str, first.seeds))
    lines += [
        f"{timing.machine}, {report.precision}, {timing.date}; seeds {seeds}. Again, or on:",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int]) -> list[str]:
    """A Markdown table; the columns of `words` are no numbers."""
    rules = ["---" if place in words else "---:" for place in range(len(heads))]
    return [f"| {' | '.join(row)} |" for row in (heads, rules, *rows)]


def _designs(report: CompareReport) -> list[str]:
    heads = [
        *("", "bits per byte", "range of seeds", "parameters", "of a token", "steps", "tokens"),
        *("training FLOPs", "seconds a step"),
    ]
    asked = report.metrics[0].unit == "accuracy"
    if asked:
        heads.insert(1, "accuracy")
    looped = any(one.unrolled_parameters > one.parameters for one in report.contenders)
    if looped:
        heads.insert(heads.index("of a token"), "in plain layers")
    rows = [
        [
            f"`{one.name}`",
            *([f"{sum(one.primary) / len(one.primary):.1%}"] if asked else []),
            f"{one.score:.4f}",
            f"{min(one.scores):.4f} to {max(one.scores):.4f}",
            f"{one.parameters:,}",
            *([f"{one.unrolled_parameters:,}"] if looped else []),
            f"{one.active_parameters:,}",
            f"{one.steps:,}",
            f"{one.tokens:,}",
            f"{one.training_flops:.3g}",
            f"{report.timing.step_seconds[one.name]:.3g}",
        ]
        for one in report.contenders
    ]
    if len(rows) > MOST_COLUMNS:
        return table(heads, rows, [0])
    turned = [list(column) for column in zip(heads, *rows, strict=True)]
    return table(turned[0], turned[1:], [0])


def _differences(report: CompareReport) -> list[str]:
    several = len(report.contenders) > 2
    heads = ["metric", "difference (95 % interval)", "p", "effect size", "outcome"]
    rows = []
    for one in report.metrics:
        gap = one.difference
        rows.append(
            [
                cell(one.name),
                f"{gap.value:+.4f}{interval(one)}",
                probability(gap.p_holm),
                number(gap.effect_size, 1),
                one.outcome,
            ]
        )
        if several:
            rows[-1].insert(1, f"`{one.contender}`")
    if several:
        heads.insert(1, "design")
    return table(heads, rows, [0, 1, len(heads) - 1] if several else [0, len(heads) - 1])


def _dropped(report: CompareReport) -> list[str]:
    if not report.dropped:
        return []
    heads = ["dropped", "why"]
    rows = [[f"`{one.name}`", cell(one.why)] for one in report.dropped]
    return ["These were not trained to the end:", "", *table(heads, rows, [0, 1]), ""]


def _drivers(report: CompareReport) -> list[str]:
    """What makes the intervals as wide as they are, and what would make them narrower."""
    lines = []
    for one in report.metrics:
        gap = one.difference
        if one.name != report.metrics[0].name:
            continue
        if gap.from_seeds is None:
            few = "one seed" if one.seeds == 1 else "one item" if one.items == 1 else None
            told = "all pairs differ alike" if few is None else f"{few} says nothing of others"
            lines.append(f"`{one.contender}`: {told}.")
            continue
        lines.append(
            f"`{one.contender}`: {gap.from_seeds:.0%} of the squared standard error come from the "
            f"{one.seeds} seeds, the rest from the {one.items} items. A true difference of "
            f"{number(gap.detectable, 4)} would be found four times in five; one as large as this "
            f"takes {seeds_needed(one)}. For these very models and other items p is "
            f"{probability(gap.p_items)}."
        )
    return lines


def seeds_needed(one: ComparedMetric) -> str:
    """In words."""
    count = one.difference.seeds_needed
    return "more than 1,000 seeds, or more items" if count is None else f"about {count} seeds"


def _accuracies(report: CompareReport) -> list[str]:
    """By difficulty, where questions were asked."""
    if not report.contenders[0].accuracy:
        return []
    lines = ["## Right answers, by difficulty", ""]
    for corpus, levels in report.contenders[0].accuracy.items():
        rows = [
            [f"`{one.name}`", *(f"{share:.1%}" for share in one.accuracy[corpus].values())]
            for one in report.contenders
        ]
        lines += [*table([cell(corpus), *map(str, levels)], rows, [0]), ""]
    found = {
        one.name: one.constant_answer for one in report.metrics if one.constant_answer is not None
    }
    names = {name: name.removeprefix("accuracy: ") for name in found}
    if len(found) > 1:
        names["accuracy"] = "all together"
    else:
        names["accuracy"] = next(iter(report.contenders[0].accuracy))
    told = ", ".join(f"{cell(names[name])} {value:.1%}" for name, value in found.items())
    return [*lines, f"One answer for all questions of a corpus gets right: {told}.", ""]


def _depths(report: CompareReport) -> list[str]:
    """By depth, of designs with loops or steps."""
    deep = [one for one in report.contenders if one.depths]
    if not deep:
        return []
    lines = ["## Right answers, by depth", ""]
    for corpus in deep[0].depths:
        longest = max(len(one.depths[corpus].by_depth) for one in deep)
        rows = []
        for one in deep:
            own = one.depths[corpus]
            rows.append(_row(f"`{one.name}`", own.by_depth, longest))
            if own.ended:
                rows.append(_row("ended there", own.ended, longest))
        heads = [cell(corpus), *(str(depth) for depth in range(1, longest + 1))]
        lines += [*table(heads, rows, [0]), ""]
        for one in deep:
            own = one.depths[corpus]
            if own.early is None:
                continue
            mean = sum(depth * share for depth, share in own.ended.items())
            full = own.by_depth[len(own.ended)]
            lines += [
                f"By its own rule `{one.name}` ends after {mean:.2f} of {len(own.ended)} on "
                f"average, with {own.early:.1%} right instead of {full:.1%}.",
                "",
            ]
    return [
        *lines,
        "A depth is a loop of every token, or a step of every question; all of them end there. "
        "Nothing here is calibrated: `valkyrie calibrate` does that, with a guarantee.",
        "",
    ]


def _row(name: str, values: dict[int, float], longest: int) -> list[str]:
    told = [f"{share:.1%}" for share in values.values()]
    return [name, *told, *["-"] * (longest - len(told))]


def _views(report: CompareReport) -> list[str]:
    names = [one.name for one in report.contenders]
    titles = {"params": "parameters", "flops": "training FLOPs", "seconds": "seconds of steps"}
    heads = ["", *(titles[key] for key in report.views)]
    made = ["equal", *("yes" if one.matched else "no" for one in report.views.values())]
    rows = [made]
    for one in report.contenders:
        spent = report.timing.step_seconds[one.name] * one.steps
        told = [f"{one.parameters:,}", f"{one.training_flops:.4g}", f"{spent:.4g}"]
        rows.append([f"`{one.name}`", *told])
    for name in names[1:]:
        gaps = [
            (
                report.timing.difference_at_equal_seconds
                if key == "seconds"
                else view.difference_at_equal
            ).get(name)
            for key, view in report.views.items()
        ]
        title = f"`{name}` less `{names[0]}`, bits per byte"
        rows.append([title, *(number(gap, 4, sign=True) for gap in gaps)])
    told = [
        "What trainings are not equal in is read off the validation curves (of less text than the "
        "table of differences), where both had spent as much as the cheaper one did in all. The "
        "one that is cut short there had not finished its schedule, which favours the other. At "
        "other parameters a design is another design: no curve tells.",
    ]
    return [*table(heads, rows, [0]), "", *told]


def interval(one: ComparedMetric) -> str:
    """In brackets, or nothing."""
    gap = one.difference
    return "" if gap.low is None or gap.high is None else f" ({gap.low:+.4f} to {gap.high:+.4f})"


def cell(text: str) -> str:
    """A name that is no end of a table's cell."""
    return text.replace("|", "\\|")


def probability(value: float | None) -> str:
    """Four digits, and never a plain zero."""
    return "<0.0001" if value is not None and value < 1e-4 else number(value, 4)


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
