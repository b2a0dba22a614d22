"""The tables of `valkyrie plan`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from valkyrie_cli.render import human_count, human_seconds, make_table, safe_line

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import PlanReport
    from valkyrie_core.report.plan import Crossover, DeviceEstimate


def human_bytes(size: float | None) -> str:
    """Bytes in powers of 1024: 512 B, 1.5 KiB, 3.42 GiB."""
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return (
                f"{size:.0f} B"
                if unit == "B"
                else f"{size:.{4 if abs(size) >= 999.5 else 3}g} {unit}"
            )
        size /= 1024
    return f"{size:,.1f} TiB"


def draw_plan(report: PlanReport, console: Console) -> None:
    """A few tables, what is exact before what is estimated."""
    console.print(
        f"{safe_line(report.recipe)}: {report.layers} layer{'s' * (report.layers != 1)}, "
        f"{report.parameters.total:,} parameters{_active(report)}, {report.steps:,} steps of "
        f"{report.tokens_per_step:,} tokens, {report.precision}"
    )
    _draw_parts(report, console)
    _draw_memory(report, console)
    if report.crossover is not None:
        _draw_lengths(report, report.crossover, console)
    _draw_seconds(report, console)
    _draw_fit(report, console)
    if report.names_fit:
        console.print(
            "The recipe names train.fit: where a step takes more memory or time than there is, "
            "training makes it smaller, and says how.",
            soft_wrap=True,
        )


def _active(report: PlanReport) -> str:
    active = report.parameters.active
    return "" if active == report.parameters.total else f" ({active:,} active)"


def _draw_parts(report: PlanReport, console: Console) -> None:
    length = f"{report.flops_per_token.context_len:,}"
    decoding, title = "decoding FLOPs", f"Per token, at a context of {length}"
    if report.crossover is None:
        decoding, title = "answering FLOPs", f"Per cell of {length}: a step, and a whole answer"
    table = make_table(
        *("part", "parameters", "training FLOPs", "share", decoding),
        title=title,
        right=["parameters", "training FLOPs", "share", decoding],
    )
    flops = report.flops_per_token
    for part, count in report.parameters.by_part.items():
        of_part = flops.by_mixer.get(part)
        if of_part is None:
            table.add_row(part, f"{count:,}", "", "", "")
            continue
        share = f"{of_part.train / flops.train:.1%}"
        train, decode = (human_count(float(n)) for n in (of_part.train, of_part.decode))
        table.add_row(part, f"{count:,}" if count else "tied", train, share, decode)
    total = [human_count(float(n)) for n in (flops.train, flops.decode)]
    table.add_row("all", f"{report.parameters.total:,}", total[0], "", total[1], style="bold")
    if flops.recomputed:
        again = human_count(float(flops.recomputed))
        table.add_row("recomputed besides", "", again, f"{flops.recomputed / flops.train:.1%}", "")
    console.print(table)


def _draw_memory(report: PlanReport, console: Console) -> None:
    size = report.bytes
    table = make_table("memory of training", "bytes", "", right=["bytes"])
    rows = [
        ("weights", size.weights, ""),
        ("gradients", size.gradients, ""),
        ("optimizer", size.optimizer, ""),
        (
            "activations",
            size.activations.recipe,
            f"{human_bytes(size.activations.kept)} kept, "
            f"{human_bytes(size.activations.recomputed)} with activation checkpointing",
        ),
        ("peak of all tensors", size.peak, "within one step, temporaries included"),
        ("Python and libraries", size.held, "measured here: a training of next to nothing"),
        (
            "peak of the process",
            size.process_peak,
            "predicted: both, and a tenth for what the heap wastes",
        ),
        ("a checkpoint on the disk", size.checkpoint, ""),
        ("checkpoints at one time", size.checkpoints, "newest, best, one being written"),
    ]
    for name, value, note in rows:
        table.add_row(name, human_bytes(value), note)
    console.print(table)


def _draw_lengths(report: PlanReport, crossover: Crossover, console: Console) -> None:
    table = make_table(
        *("context", "KV cache", "recurrent state", "decoding FLOPs", "all attention"),
        title="One sequence, one more token (fp32)",
        right=["context", "KV cache", "recurrent state", "decoding FLOPs", "all attention"],
    )
    for state, flops in zip(
        report.bytes.states, report.flops_per_token.decode_by_length, strict=True
    ):
        table.add_row(
            f"{state.tokens:,}",
            human_bytes(state.kv_cache),
            human_bytes(state.recurrent),
            human_count(float(flops.flops)),
            human_count(float(flops.attention)),
        )
    console.print(table)
    console.print(f"All attention: {crossover.twin}.")
    if crossover.flops is not None or crossover.bytes is not None:
        console.print(
            f"Cheaper to decode than that: by FLOPs {_since(crossover.flops)}, by bytes read "
            f"{_since(crossover.bytes)}."
        )
    console.print()


def _since(tokens: int | None) -> str:
    if tokens is None:
        return "never"
    return "from the first token on" if tokens == 1 else f"from {tokens:,} tokens on"


def _draw_seconds(report: PlanReport, console: Console) -> None:
    decodes = report.crossover is not None
    columns = ["device", "step at peak", "step", "recipe", "needs", "fits"]
    columns[4:4] = ["decode"] * decodes
    table = make_table(*columns, title="Time, estimated", right=columns[1:-1])
    for one in report.seconds:
        table.add_row(
            safe_line(one.name) + ("" if one.published else " (here)"),
            _duration(one.step_at_peak),
            _duration(one.step),
            _duration(one.recipe),
            *_speed(one),
            human_bytes(one.needed),
            _fits(one),
        )
    console.print(table)
    here, *others = report.seconds
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    console.print(f"Here ({threads}, {here.precision}): {here.basis}.")
    if others:
        console.print(f"Others (bf16): {others[0].basis}.")
        console.print("Their needs are those of tensors: a driver's own memory comes on top.")
    if decodes:
        console.print(
            "Decoding: an upper bound, weights and state read once per token by all memory."
        )
    console.print()


def _speed(one: DeviceEstimate) -> list[str]:
    speed = one.decode_tokens_per_second
    return [] if speed is None else [f"{human_count(speed)} tok/s"]


def _duration(seconds: float) -> str:
    """Three digits, from milliseconds to years."""
    if 0 < seconds < 1e-6:
        return "< 0.001 ms"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    for length, name in ((365 * 86400, "years"), (86400, "days")):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {name}"
    return human_seconds(seconds)


def _fits(one: DeviceEstimate) -> str:
    if one.fits is None:
        return "?"
    return "yes" if one.fits else f"no, of {human_bytes(one.memory)}"


def _draw_fit(report: PlanReport, console: Console) -> None:
    fit = report.fit
    if fit is None:
        return
    of = "asked for" if fit.source == "asked" else "free on this machine"
    budget = f"{human_bytes(fit.budget)} {of}"
    if fit.best is None:
        least = min(fit.tried, key=lambda one: one.needed)
        console.print(
            f"Nothing fits {budget}: the least, {_settings(least.changes)}, is predicted to take "
            f"{human_bytes(least.needed)}, {human_bytes(fit.short_by)} too much. A smaller "
            "train.context_len or model needs less.",
        )
        return
    peak = human_bytes(fit.best.needed)
    if not fit.best.changes:
        console.print(f"It fits {budget} as it is: {peak} at the peak.")
        return
    first = human_bytes(fit.tried[0].needed)
    console.print(f"As it is ({first}) it does not fit {budget}. The cheapest change that does:")
    console.print(f"{peak} at the peak, with")
    # one line, to be pasted
    console.print(f"  {_settings(fit.best.changes)}", soft_wrap=True)


def _settings(changes: list[str]) -> str:
    return " ".join(f"--set {shlex.quote(change)}" for change in changes) or "the recipe as it is"
