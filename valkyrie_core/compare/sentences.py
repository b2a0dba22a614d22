"""The verdict in words."""

from __future__ import annotations

from collections.abc import Sequence

from valkyrie_core.compare.verdict import ACCURACY
from valkyrie_core.report.comparison import ComparedMetric, Difference

MOST_SENTENCES = 2
"""Contenders that have a sentence of their own."""


def sentence(reference: str, found: Sequence[ComparedMetric], match: str) -> str:
    """What the first metric of each contender says, in words; of many, all in one."""
    first = [one for one in found if one.name == found[0].name]
    if len(first) > MOST_SENTENCES:
        return _summary(reference, first, match)
    return " ".join(_sentence(reference, one, match) for one in first)


def _summary(reference: str, first: Sequence[ComparedMetric], match: str) -> str:
    """Which ones are better, which worse, and which one scores best."""
    by_outcome = {
        outcome: [one.contender for one in first if one.outcome == outcome]
        for outcome in ("better", "worse", "not enough evidence")
    }
    parts = [
        f"{outcome} than {reference}: {', '.join(by_outcome[outcome])}"
        for outcome in ("better", "worse")
        if by_outcome[outcome]
    ]
    if unknown := by_outcome["not enough evidence"]:
        parts.append(f"not enough evidence on {', '.join(unknown)}")
    sign = 1 if first[0].lower_is_better else -1
    best = min(first, key=lambda one: sign * one.contender_mean)
    gap = best.difference
    score = f"{best.contender} ({gap.value:+.4f} {best.unit}"
    if sign * gap.value >= 0:
        score = f"{reference} ({first[0].reference_mean:.4f} {best.unit}"
    elif gap.low is not None and gap.high is not None:
        score += f", 95 % interval {gap.low:+.4f} to {gap.high:+.4f}"
    return f"{_budget(match).capitalize()}: {'; '.join(parts)}. The best score has {score})."


def _budget(match: str) -> str:
    equal = {"tokens": "tokens", "params": "parameters and tokens", "flops": "training FLOPs"}
    return f"at equal {equal.get(match, 'seconds')}"


def _sentence(reference: str, one: ComparedMetric, match: str) -> str:
    budget = _budget(match)
    gap = one.difference
    where = f"{one.seeds} seeds, {one.items} items"
    if gap.low is None or gap.high is None:
        value = f"{gap.value:+.4f} {one.unit}"
        if one.seeds > 1 and one.items > 1:
            return (
                f"{one.contender} differs from {reference} by {value} {budget}, for every seed and "
                f"item alike, which leaves no spread to measure it by; p by signs alone is "
                f"{_p(gap.p_holm)} ({where}): {one.outcome}."
            )
        few = "one seed" if one.seeds == 1 else "one item"
        return (
            f"Not enough evidence on {one.contender} against {reference} {budget}: {few} says "
            f"nothing of others ({value}, of these models)."
        )
    interval = f"95 % interval {gap.low:+.4f} to {gap.high:+.4f}"
    value = f"{gap.value:+.4f} {one.unit}"
    if gap.value == 0 and gap.low == gap.high == 0:
        alike = (
            "give the same right answers" if one.unit == ACCURACY else "are equal to the last bit"
        )
        return f"{one.contender} and {reference} {alike} {budget}; {where}."
    if one.outcome != "not enough evidence":
        return (
            f"{one.contender} is {one.outcome} than {reference} {budget}: {value} "
            f"({interval}, p = {_p(gap.p_holm)} after Holm's correction; {where})."
        )
    return (
        f"No difference was found between {one.contender} and {reference} {budget}: "
        f"{value} ({interval}; {where}). One of {gap.detectable:.4f} would have been found four "
        f"times in five{_more(gap)}."
    )


def _more(gap: Difference) -> str:
    if gap.seeds_needed is None:
        return "; more seeds would not find one of this size, more text might"
    return f"; one of this size would take about {gap.seeds_needed} seeds"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "less than 0.0001" if value < 1e-4 else f"{value:.4f}"
