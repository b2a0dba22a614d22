"""The tables of `valkyrie allocate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from valkyrie_cli.render import human_count, human_seconds, make_table

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import (
        AllocateReport,
        Estimate,
        ImportanceReport,
        SearchReport,
        StackPicture,
    )

BAR = 8
"""Columns of the longest bar."""


def draw_report(report: AllocateReport, console: Console) -> None:
    """The stack of a recipe and, where one was asked for, of the design."""
    console.print(f"{report.recipe}: {report.stack.pattern}")
    if report.design is None:
        _draw_stack(report.stack, report.context_len, console)
    else:
        console.print(f"{report.asked}: {report.design.pattern}")
        _draw_stack(report.design, report.context_len, console)
        before, after = report.stack, report.design
        console.print(
            f"parameters {before.parameters:,} -> {after.parameters:,}, FLOPs per token "
            f"{human_count(float(before.flops_per_token))} -> "
            f"{human_count(float(after.flops_per_token))}, state "
            f"{_size(before.state_bytes)} -> {_size(after.state_bytes)}"
        )
    for note in report.notes:
        console.print(f"- {note}")
    if report.out is not None:
        console.print(f"written: {report.out}", soft_wrap=True)


def _draw_stack(stack: StackPicture, context_len: int, console: Console) -> None:
    numbers = ["window", "parameters", "state"]
    most = max(row.flops_share for row in stack.rows)
    table = make_table(
        *("", "block", "mixer", "ffn", "position", "window", "parameters"),
        *("FLOPs", "state"),
        right=["", *numbers],
    )
    # one space between columns: names of blocks leave little of 100
    table.padding = (0, 1, 0, 0)
    for row in stack.rows:
        window = "" if row.mixer != "attention" else "all" if row.window is None else row.window
        bar = "█" * round(BAR * row.flops_share / most)
        table.add_row(
            "" if row.layer is None else str(row.layer),
            row.block,
            row.mixer,
            row.ffn,
            row.position,
            str(window),
            f"{row.parameters:,}",
            f"{row.flops_share:6.1%} {bar}" if row.flops else "",
            _size(row.state_bytes) if row.layer is not None else "",
        )
    table.add_section()
    flops = human_count(float(stack.flops_per_token))
    table.add_row(
        *("", "total", "", "", "", "", f"{stack.parameters:,}", flops, _size(stack.state_bytes)),
        style="bold",
    )
    console.print(table)
    console.print(
        f"FLOPs per token of training, by formula, over {context_len:,} tokens. State: of one "
        f"sequence\nafter as many, keys and values in bf16, recurrent states in fp32."
    )


def draw_search(report: SearchReport, console: Console) -> None:
    """The Pareto table, the choice and its reason."""
    right = ["rung", "seeds", "bits per byte", "recall", "decode bytes", "FLOPs"]
    table = make_table(
        *("candidate", "rung", "seeds", "bits per byte", "recall", "decode bytes", "FLOPs"),
        "Pareto",
        right=right,
    )
    for one in report.candidates:
        table.add_row(
            one.candidate,
            str(one.rung),
            str(one.bpb.seeds),
            _estimate(one.bpb, 4),
            _estimate(one.recall, 3),
            _size(one.decode_bytes),
            human_count(float(one.training_flops)),
            "*" if one.pareto else "",
            style="bold" if one.candidate == report.chosen else None,
        )
    console.print(table)
    budget = ", ".join(f"{name} {value:,}" for name, value in report.budget.items())
    console.print(
        "Bits per byte and recall: measured on proxies, with 95 % intervals over the seeds. Decode "
        "bytes (one token after 16,384, bf16) and training FLOPs per token: by formula, at full "
        f"width. *: no other candidate of its rung is better in one and as good in all.\n{budget}; "
        f"{report.trainings} trainings, {human_seconds(report.training_seconds)} of one thread"
    )
    console.print(f"chosen: {report.chosen or '-'}", style="bold")
    console.print(report.reason)
    if report.seeds_needed is not None:
        console.print(f"about {report.seeds_needed} seeds may tell: --seeds {report.seeds_needed}")
    if report.out is not None:
        console.print(f"written: {report.out}", soft_wrap=True)


def draw_importance(report: ImportanceReport, console: Console) -> None:
    """KL by layer, and which attention layers could become recurrent."""
    console.print(
        f"{report.run}, step {report.step}: {report.windows} windows of {report.context_len} "
        f"tokens, {human_seconds(report.seconds)}"
    )
    most = max((one.kl for one in report.layers), default=0.0)
    table = make_table(
        *("layer", "block", "mixer", "change", "KL, nats per token", "95 %", ""),
        right=["layer", "KL, nats per token"],
    )
    for one in report.layers:
        change = one.change if one.change == "removed" else f"window {report.window}"
        bar = "█" * round(BAR * one.kl / most) if most > 0 else ""
        interval = f"{one.low:.4f} to {one.high:.4f}"
        table.add_row(str(one.layer), one.block, one.mixer, change, f"{one.kl:.4f}", interval, bar)
    console.print(table)
    console.print(
        "KL(original || changed) of the next token on held-out text, one layer changed at a time; "
        "intervals by a bootstrap over the windows."
    )
    if report.could_become_recurrent:
        order = ", ".join(str(layer) for layer in report.could_become_recurrent)
        console.print(
            f"attention layers, the one that a window changes least first: {order} - the first "
            "ones are the first to become recurrent"
        )
    else:
        console.print("no attention layer sees further than the window")


def _estimate(value: Estimate, digits: int) -> str:
    if value.mean is None:
        return "diverged"
    text = f"{value.mean:.{digits}f}"
    return text if value.half_width is None else f"{text} ± {value.half_width:.{digits}f}"


def _size(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):,.1f} KiB"
