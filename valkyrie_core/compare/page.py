"""comparison.md: the verdict in words, on one page."""

from __future__ import annotations

from valkyrie_core.report.comparison import ComparedMetric, CompareReport


def comparison_page(report: CompareReport, picture: str, command: str) -> str:
    """The page in Markdown.

    Args:
        picture: the file of the plots, beside the page.
        command: what makes the page again.
    """
    names = [one.name for one in report.contenders]
    lines = [
        f"# {' against '.join(reversed(names))}",
        "",
        f"**{report.verdict}**",
        "",
        f"![curves and differences]({picture})",
        "",
        "## The designs",
        "",
        *_designs(report),
        "",
        "## The differences",
        "",
        f"Each less `{report.reference}`'s: fewer bits and more right answers are better. "
        "Intervals are 95 %, over other seeds and other items; the first metric is tested by "
        "itself, the others together: p after Holm's correction within each.",
        "",
        *_differences(report),
        "",
        *(f"- {line}" for line in _drivers(report)),
        "",
        *_accuracies(report),
        "## Equal in what?",
        "",
        *_views(report),
        "",
        "Read off the curves: bits per byte less the reference's where both had spent as much as "
        "the cheaper one did in all. The one that is cut short there had not finished its "
        "schedule, which favours the other.",
        "",
    ]
    if report.notes:
        lines += ["## What to know", "", *(f"- {note}" for note in report.notes), ""]
    return "\n".join([*lines, "Again, or on:", "", f"    {command}", ""])


def _designs(report: CompareReport) -> list[str]:
    lines = [
        "| design | bits per byte | parameters | of a token | steps | tokens | training FLOPs | "
        "seconds a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in report.contenders:
        spread = f" ({min(one.scores):.4f} to {max(one.scores):.4f})" if len(one.scores) > 1 else ""
        seconds = report.timing.step_seconds[one.name]
        lines.append(
            f"| `{one.name}` | {one.score:.4f}{spread} | {one.parameters:,} | "
            f"{one.active_parameters:,} | {one.steps:,} | {one.tokens:,} | "
            f"{one.training_flops:.3g} | {seconds:.3f} |"
        )
    return lines


def _differences(report: CompareReport) -> list[str]:
    lines = [
        "| metric | design | difference | 95 % interval | p | effect size | outcome |",
        "|---|---|---:|---|---:|---:|---|",
    ]
    for one in report.metrics:
        gap = one.difference
        lines.append(
            f"| {cell(one.name)} | `{one.contender}` | {gap.value:+.4f} | {interval(one)} | "
            f"{probability(gap.p_holm)} | {number(gap.effect_size, 1)} | {one.outcome} |"
        )
    return lines


def _drivers(report: CompareReport) -> list[str]:
    """What makes the intervals as wide as they are, and what would make them narrower."""
    lines = []
    for one in report.metrics:
        gap = one.difference
        if one.name != report.metrics[0].name:
            continue
        if gap.from_seeds is None:
            lines.append(f"`{one.contender}`: one seed, so nothing is known of others.")
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
    return "more than 1,000 seeds, or more items" if count is None else f"{count} seeds"


def _accuracies(report: CompareReport) -> list[str]:
    """By difficulty, where questions were asked."""
    if not report.contenders[0].accuracy:
        return []
    lines = ["## Right answers, by difficulty", ""]
    for corpus, levels in report.contenders[0].accuracy.items():
        lines += [
            f"| {cell(corpus)} | {' | '.join(map(str, levels))} |",
            f"|---|{'---:|' * len(levels)}",
        ]
        for one in report.contenders:
            shares = [f"{share:.1%}" for share in one.accuracy[corpus].values()]
            lines.append(f"| `{one.name}` | {' | '.join(shares)} |")
        lines.append("")
    found = {
        one.name: one.constant_answer for one in report.metrics if one.constant_answer is not None
    }
    told = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
    return [*lines, f"One answer for all questions of a corpus: {told}.", ""]


def _views(report: CompareReport) -> list[str]:
    names = [one.name for one in report.contenders]
    heads = ["equal", "made equal", *(f"`{name}`" for name in names)]
    heads += [f"read off the curves: `{name}`" for name in names[1:]]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|{'---:|' * (len(heads) - 2)}"]
    titles = {"params": "parameters", "flops": "training FLOPs", "seconds": "seconds of steps"}
    steps = {one.name: one.steps for one in report.contenders}
    for key, view in report.views.items():
        if key == "seconds":
            spent = {name: report.timing.step_seconds[name] * steps[name] for name in names}
            values = [f"{spent[name]:.3g}" for name in names]
            gaps = report.timing.difference_at_equal_seconds
        else:
            values = [f"{view.values[name]:.4g}" for name in names]
            gaps = view.difference_at_equal
        if key == "params":
            values = [f"{int(view.values[name] or 0):,}" for name in names]
        told = [number(gaps.get(name), 4, sign=True) for name in names[1:]]
        made = "yes" if view.matched else ""
        lines.append(f"| {titles[key]} | {made} | {' | '.join([*values, *told])} |")
    return lines


def interval(one: ComparedMetric) -> str:
    """In brackets, or a dash."""
    gap = one.difference
    return "-" if gap.low is None or gap.high is None else f"{gap.low:+.4f} to {gap.high:+.4f}"


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
