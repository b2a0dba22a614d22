"""From scores to a sentence.

Shapes: S seeds, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from valkyrie_core.compare.scores import RunScores, bits_SI
from valkyrie_core.compare.statistics import Effect, effect, holm
from valkyrie_core.report.comparison import ComparedMetric, Difference

BITS = "bits per byte"
LEVEL = 0.05


def metrics(scores: Mapping[str, Sequence[RunScores]]) -> list[ComparedMetric]:
    """Every contender against the first one: of all corpora together, then of each.

    Args:
        scores: by contender, one for every seed; all have read the same items.
    """
    names = list(scores)
    corpora = list(scores[names[0]][0].corpora)
    groups = {BITS: corpora}
    if len(corpora) > 1:
        groups |= {f"{BITS}: {name}": [name] for name in corpora}
    rows = [
        (title, name, *_pair(scores[names[0]], scores[name], group))
        for title, group in groups.items()
        for name in names[1:]
    ]
    known = [found.p for *_, found in rows if found.p is not None]
    corrected = iter(holm(known))
    return [
        _metric(title, name, mean, other, found, None if found.p is None else next(corrected))
        for title, name, mean, other, found in rows
    ]


def _pair(
    reference: Sequence[RunScores], contender: Sequence[RunScores], corpora: Sequence[str]
) -> tuple[float, float, Effect]:
    a_SI, bytes_I = bits_SI(reference, corpora)
    b_SI, _ = bits_SI(contender, corpora)
    share_I = bytes_I / bytes_I.sum()
    means = (float((a_SI @ share_I).mean()), float((b_SI @ share_I).mean()))
    return (*means, effect(b_SI - a_SI, bytes_I))


def _metric(
    title: str, name: str, reference: float, contender: float, found: Effect, p_holm: float | None
) -> ComparedMetric:
    outcome: Literal["better", "worse", "not enough evidence"] = "not enough evidence"
    # equal to the last bit is no evidence either, whatever its p
    if p_holm is not None and p_holm < LEVEL and found.value:
        outcome = "better" if found.value < 0 else "worse"
    return ComparedMetric(
        name=title,
        contender=name,
        lower_is_better=True,
        items=found.items,
        seeds=found.seeds,
        reference_mean=reference,
        contender_mean=contender,
        difference=Difference(
            value=found.value,
            low=found.low,
            high=found.high,
            p=found.p,
            p_holm=p_holm,
            p_items=found.p_items,
            from_seeds=found.from_seeds,
            effect_size=found.effect_size,
            detectable=found.detectable,
            seeds_needed=found.seeds_needed,
        ),
        outcome=outcome,
    )


def sentence(reference: str, found: Sequence[ComparedMetric], match: str) -> str:
    """What the first metric of each contender says, in words."""
    return " ".join(_sentence(reference, one, match) for one in found if one.name == BITS)


def _sentence(reference: str, one: ComparedMetric, match: str) -> str:
    equal = {"tokens": "tokens", "params": "parameters and tokens", "flops": "training FLOPs"}
    budget = f"at equal {equal.get(match, 'seconds')}"
    gap = one.difference
    where = f"{one.seeds} seeds, {one.items} items"
    if gap.low is None or gap.high is None:
        return (
            f"Not enough evidence on {one.contender} against {reference} {budget}: one seed says "
            f"nothing of others ({gap.value:+.4f} {BITS}, of these two models)."
        )
    interval = f"95 % interval {gap.low:+.4f} to {gap.high:+.4f}"
    if gap.value == 0 and gap.low == gap.high == 0:
        return f"{one.contender} and {reference} are equal to the last bit {budget}, {where}."
    if one.outcome != "not enough evidence":
        return (
            f"{one.contender} is {one.outcome} than {reference} {budget}: {gap.value:+.4f} {BITS} "
            f"({interval}, p = {_p(gap.p_holm)} after Holm's correction; {where})."
        )
    return (
        f"No difference was found between {one.contender} and {reference} {budget}: "
        f"{gap.value:+.4f} {BITS} ({interval}; {where}). One of {gap.detectable:.4f} would have "
        f"been found four times in five{_more(gap)}."
    )


def _more(gap: Difference) -> str:
    if gap.seeds_needed is None:
        return "; more seeds would not find one of this size, more text might"
    return f"; one of this size would take {gap.seeds_needed} seeds"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "less than 0.0001" if value < 1e-4 else f"{value:.4f}"
