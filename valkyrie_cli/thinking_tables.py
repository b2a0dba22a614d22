"""How much thought answers take, and thresholds with a guarantee, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from valkyrie_cli.render import make_table, safe_line

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import CalibrateReport, HaltingScore, MemoryScore, ThinkingScore

MOST_ROWS = 12
"""Thresholds that are shown; the last ones decide."""
MOST_COLUMNS = 10
"""Depths that are shown."""


def draw_thinking(name: str, thinking: ThinkingScore, console: Console) -> None:
    """Every depth by itself, and what a rule saves."""
    depths = shown(list(thinking.by_depth))
    word = "loops" if thinking.unit == "loops of a token" else "steps"
    table = make_table("", *map(str, depths), right=list(map(str, depths)))
    table.add_row(
        f"{safe_line(name)}: {thinking.measure} by {word}",
        *(_told(thinking, thinking.by_depth[depth]) for depth in depths),
    )
    if thinking.halting is not None:
        shares = [thinking.halting.steps.get(depth, 0.0) for depth in depths]
        ended = "ended" if thinking.halting.then == "halt" else "sure"
        table.add_row(f"  {ended} there, by the rule", *(f"{share:.1%}" for share in shares))
    console.print(table)
    if thinking.halting is not None:
        _draw_halting(thinking, thinking.halting, word, console)
    if thinking.calibration_error is not None:
        more = ""
        if thinking.q_continue_mean is not None:
            more = f", going on {thinking.q_continue_mean:.3f}"
        console.print(
            f"Confidence: mean {thinking.q_halt_mean:.3f}{more}; expected calibration error "
            f"{thinking.calibration_error:.3f}, Brier score {thinking.brier:.3f}."
        )


def shown(depths: list[int]) -> list[int]:
    """All of them, or of many some: the first and the last among them."""
    if len(depths) <= MOST_COLUMNS:
        return depths
    every = (len(depths) - 1) / (MOST_COLUMNS - 1)
    return [depths[round(every * place)] for place in range(MOST_COLUMNS)]


def _draw_halting(
    thinking: ThinkingScore, halting: HaltingScore, word: str, console: Console
) -> None:
    promise = ""
    if halting.calibrated_risk is not None:
        promise = f" (calibrated: risk at most {halting.calibrated_risk:.1%})"
    saved = 1 - halting.seconds / halting.full_seconds
    depths = (
        f"{halting.reasoning_steps:.2f} {word} instead of {max(halting.steps)}, "
        f"{halting.halt_rate:.0%} end early"
    )
    if halting.then == "cheapest":
        depths = (
            f"{halting.halt_rate:.0%} of the tokens go on through the cheapest mixers, after "
            f"{halting.reasoning_steps:.2f} {word} of {max(halting.steps)} on average"
        )
    console.print(
        f"Rule {halting.rule}{promise}: {depths}; {thinking.measure} "
        f"{_told(thinking, halting.score)} instead of {_told(thinking, halting.full_score)}; "
        f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} seconds."
    )


def draw_memory(name: str, memory: MemoryScore, console: Console) -> None:
    """What a memory of verified answers did."""
    console.print(
        f"{safe_line(name)} with a memory (cosine {memory.threshold:g}): {memory.hits} hits, "
        f"{memory.refused} refused by the checker, {memory.misses} misses; {memory.stored} "
        f"verified answers stored; right answers {memory.share:.1%}, "
        f"{memory.reasoning_steps:.2f} steps a question."
    )


def _told(thinking: ThinkingScore, value: float) -> str:
    return f"{value:.1%}" if thinking.measure == "right answers" else f"{value:.4f}"


def draw_calibration(report: CalibrateReport, console: Console) -> None:
    """The walk down the thresholds, and what the last one that holds does."""
    columns = ("confidence", "risk", "p", "mean depth", "")
    table = make_table(*columns, right=columns[:4])
    for one in report.tried[-MOST_ROWS:]:
        table.add_row(
            f"{one.threshold:.4f}",
            f"{one.risk:.2%}",
            f"{one.p:.3f}",
            f"{one.reasoning_steps:.2f}",
            "holds" if one.holds else "does not hold",
            style="" if one.holds else "dim",
        )
    console.print(table)
    test, unit = report.test, report.unit
    if report.threshold is None:
        why = ""
        if report.rows < report.rows_needed:
            why = (
                f": it takes {report.rows_needed} {unit}s, and half of those held out are "
                f"{report.rows}"
            )
        console.print(
            f"No threshold holds a risk of {report.risk:.1%}, so full depth is kept{why}."
        )
        return
    saved = 1 - test.seconds / test.full_seconds
    ends = "thought ends" if report.then == "halt" else "tokens take the cheapest mixers"
    console.print(
        f"From a confidence of {report.threshold:.4f} on, {ends}: the risk is at most "
        f"{report.risk:.1%}, but for a chance of {report.delta:.0%} ({report.rows} {unit}s)."
    )
    scores = ""
    if test.score is not None and test.full_score is not None:
        scores = f"right answers {test.score:.1%} instead of {test.full_score:.1%}, "
    depth = "depth" if report.then == "halt" else "sure after"
    console.print(
        f"On {test.rows} others: risk {test.risk:.2%}, {scores}{depth} "
        f"{test.reasoning_steps:.2f} {'instead of' if report.then == 'halt' else 'of'} "
        f"{report.full_depth}, {abs(saved):.0%} "
        f"{'fewer' if saved >= 0 else 'more'} seconds."
    )
