"""The tables of `valkyrie eval --long-context`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from valkyrie_cli.render import human_count, human_seconds, make_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from valkyrie_core.report import LongContextReport, LongReading, RecallScore


def draw_long(report: LongContextReport, console: Console) -> None:
    console.print(
        f"{report.run}, step {report.step}, {human_count(report.parameters)} parameters, trained "
        f"on {report.trained_context} tokens at a time, {human_seconds(report.seconds)}"
    )
    seen = " (the run was trained on parts of it)" if report.seen_in_training else ""
    console.print(f"text: {report.text}{seen}, {report.text_tokens:,} tokens", markup=False)
    numbers = ["tokens", "context", "position", "tokens/s", "peak", "state", "cache", "snapshot"]
    table = make_table(*numbers, right=numbers)
    contexts = {x.context: x.bpb for x in report.by_context}
    positions = {x.end: x.bpb for x in report.by_position}
    for cost in report.memory:
        position = positions.get(cost.length)
        table.add_row(
            f"{cost.length:,}",
            f"{contexts[cost.length]:.4f}",
            _number(position),
            f"{cost.tokens_per_second:,.0f}",
            "-" if cost.peak_bytes is None else _size(cost.peak_bytes),
            _size(cost.state_bytes),
            _size(cost.cache_bytes),
            _size(cost.snapshot_bytes),
        )
    console.print(table)
    console.print(
        f"Bits per byte: {report.targets} tokens predicted from a context of this length, the same "
        "tokens for all; and, by position, the tokens of a text read once, from the length before "
        "to this one. A snapshot is a state kept by itself.\n"
        f"{report.how_far}"
    )
    if report.recall:
        _draw_recall([x for x in report.recall if x.depth is None], console)
    if report.as_trained is not None:
        _draw_price(report, report.as_trained, console)


def _draw_price(report: LongContextReport, before: LongReading, console: Console) -> None:
    """What the changes cost and save, at the longest context."""
    told = ", ".join(f"{name} {value}" for name, value in report.changes.items())
    table = make_table("", "as trained", told, right=["as trained", told])

    def row(what: str, of: Callable[[LongReading], str]) -> None:
        table.add_row(what, of(before), of(report))

    def found(reading: LongReading) -> str:
        asked = [x for x in reading.recall if x.depth is None]
        questions = sum(x.questions for x in asked)
        if not questions:
            return "-"
        return f"{sum(x.first * x.questions for x in asked) / questions:.1%} of {questions}"

    row(f"bits per byte from {report.context:,} tokens", lambda x: f"{x.by_context[-1].bpb:.4f}")
    last = report.by_position[-1]
    row(
        f"bits per byte of tokens {last.start + 1:,} to {last.end:,}",
        lambda x: _number(x.by_position[-1].bpb),
    )
    if report.recall:
        row("facts found, all lengths", found)
    row("recurrent state", lambda x: _size(x.memory[-1].state_bytes))
    row("keys and values", lambda x: _size(x.memory[-1].cache_bytes))
    console.print(table)


def _number(bpb: float | None) -> str:
    return "-" if bpb is None else f"{bpb:.4f}"


def _draw_recall(scores: list[RecallScore], console: Console) -> None:
    lengths = list(dict.fromkeys(x.length for x in scores))
    columns = [*(f"{x:,}" for x in lengths), "same word"]
    table = make_table("found at", *columns, right=columns)
    for task in dict.fromkeys(x.task for x in scores):
        by_length = {x.length: x for x in scores if x.task == task}
        cells = [
            f"{by_length[x].first:.0%} ({by_length[x].written:.0%})" if x in by_length else "-"
            for x in lengths
        ]
        asked = sum(x.questions for x in by_length.values())
        same = sum(x.constant * x.questions for x in by_length.values()) / asked
        table.add_row(task, *cells, f"{same:.0%}")
    console.print(table)
    if scores:
        console.print(
            "Found: questions whose right answer is the likeliest of "
            f"{round(1 / scores[0].chance)} candidates (guessing finds {scores[0].chance:.0%}); in "
            "brackets those that the model answers by itself. -: the facts alone are longer."
        )


def _size(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):,.1f} KiB"
