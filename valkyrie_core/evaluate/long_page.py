"""long_context.md: a long reading as a page, with its picture, to be passed on."""

from __future__ import annotations

from valkyrie_core.report import LongContextReport, LongReading

MEBIBYTE = 1 << 20


def long_page(report: LongContextReport, picture: str, command: str) -> str:
    """The page, in Markdown.

    Args:
        picture: the name of the picture's file, beside the page.
        command: what makes the page again.
    """
    changed = ", ".join(f"{name} {value}" for name, value in report.changes.items())
    seen = ", on parts of which the run was trained" if report.seen_in_training else ""
    parts = [
        f"# {report.run} at {report.context:,} tokens",
        f"Step {report.step}, {report.parameters:,} parameters, trained on "
        f"{report.trained_context:,} tokens at a time; {report.precision}, weights in "
        f"{report.weights}{', ' + changed if changed else ''}. Text: {report.text}{seen} "
        f"({report.text_tokens:,} tokens), read {report.chunk:,} tokens at once in "
        f"{report.seconds:.0f} s. `{command}`",
        report.how_far,
        f"![losses, speed and memory by length]({picture})",
        "## Losses, speed and memory by length",
        _lengths(report),
        f"Context: {report.targets:,} tokens predicted from so many before them, the same for all "
        "lengths. Position: the tokens of a text that is read once, from the length before to this "
        "one. Snapshot: a state kept by itself.",
    ]
    if report.recall:
        parts += ["## Facts found", _recall(report)]
    if report.as_trained is not None:
        parts += [f"## The price of {changed}", _price(report, report.as_trained)]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _lengths(report: LongContextReport) -> str:
    contexts = {x.context: x.bpb for x in report.by_context}
    positions = {x.end: x.bpb for x in report.by_position}
    head = ["tokens", "context: bits per byte", "position: bits per byte", "tokens/s"]
    head += [f"{what} MiB" for what in ("peak", "state", "keys and values", "snapshot")]
    rows = []
    for cost in report.memory:
        sizes = (cost.peak_bytes, cost.state_bytes, cost.cache_bytes, cost.snapshot_bytes)
        rows.append(
            [
                f"{cost.length:,}",
                _bits(contexts.get(cost.length)),
                _bits(positions.get(cost.length)),
                f"{cost.tokens_per_second:,.0f}",
                *("-" if size is None else f"{size / MEBIBYTE:,.2f}" for size in sizes),
            ]
        )
    return _table(head, rows)


def _recall(report: LongContextReport) -> str:
    head = ["task", "tokens", "depth", "questions", "likeliest", "mean rank", "written"]
    head += ["guessing", "always the same word"]
    rows = [
        [
            score.task,
            f"{score.length:,}",
            "all" if score.depth is None else f"{score.depth:.0%}",
            str(score.questions),
            f"{score.first:.0%}",
            f"{score.mean_rank:.1f}",
            f"{score.written:.0%}",
            f"{score.chance:.0%}",
            f"{score.constant:.0%}",
        ]
        for score in report.recall
    ]
    return _table(head, rows)


def _price(report: LongReading, before: LongReading) -> str:
    rows = []
    for old, new in zip(before.by_context, report.by_context, strict=True):
        rows.append(
            [
                f"bits per byte from {new.context:,} tokens",
                f"{old.bpb:.4f}",
                f"{new.bpb:.4f}",
                f"{new.bpb - old.bpb:+.5f}",
            ]
        )
    old_cost, new_cost = before.memory[-1], report.memory[-1]
    for what, old_size, new_size in (
        ("state", old_cost.state_bytes, new_cost.state_bytes),
        ("keys and values", old_cost.cache_bytes, new_cost.cache_bytes),
        ("snapshot", old_cost.snapshot_bytes, new_cost.snapshot_bytes),
    ):
        saved = f"{new_size / old_size - 1:+.0%}" if old_size else "-"
        rows.append(
            [f"{what}, MiB", f"{old_size / MEBIBYTE:.2f}", f"{new_size / MEBIBYTE:.2f}", saved]
        )
    asked = [
        (sum(x.first * x.questions for x in part), sum(x.questions for x in part))
        for part in ([x for x in one.recall if x.depth is None] for one in (before, report))
    ]
    if asked[0][1] and asked[1][1]:
        shares = [right / count for right, count in asked]
        rows.append(
            [
                f"facts found, of {asked[0][1]}",
                *(f"{share:.1%}" for share in shares),
                f"{shares[1] - shares[0]:+.1%}",
            ]
        )
    return _table(["", "as trained", "changed", "difference"], rows)


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
