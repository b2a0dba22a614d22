"""From scores to outcomes.

Shapes: S seeds, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from valkyrie_core.compare.scores import RunScores, bits_SI, kinds_I, levels_I, right_SI
from valkyrie_core.compare.statistics import Effect, effect, holm, mcnemar
from valkyrie_core.report.comparison import ComparedMetric, Difference

BITS, ACCURACY = "bits per byte", "accuracy"
LEVEL = 0.05


class _Group(NamedTuple):
    """Items that make one metric."""

    title: str
    unit: str
    corpora: Sequence[str]


def metrics(scores: Mapping[str, Sequence[RunScores]], dropped: int = 0) -> list[ComparedMetric]:
    """Every contender against the first one: of all corpora together, then of each.

    Where all corpora ask questions, the share of right answers comes first, else bits per byte. The
    first metric is tested by itself, all others together (Holm's correction within each).

    Args:
        scores: by contender, one for every seed; all have read the same items.
        dropped: contenders that were dropped by what they scored on these items. They count as
            tested, or the best of many would be tested as if it had been the only one.
    """
    names = list(scores)
    first = scores[names[0]][0]
    bits = _groups(BITS, list(first.corpora))
    right = _groups(ACCURACY, list(first.answers))
    groups = right + bits if len(first.answers) == len(first.corpora) else bits + right
    found: list[ComparedMetric] = []
    # what the verdict is about is tested by itself: else every corpus would cost it power
    for family in (groups[:1], groups[1:]):
        size = len(family) * (len(names) - 1 + dropped)
        rows = [
            (group, name, *_pair(scores[names[0]], scores[name], group, size))
            for group in family
            for name in names[1:]
        ]
        known = [gap.p for *_, gap in rows if gap.p is not None]
        corrected = iter(holm(known + [1.0] * (len(family) * dropped)))
        found += [
            _metric(
                group,
                name,
                (mean, other),
                gap,
                None if gap.p is None else next(corrected),
                _mcnemar(scores[names[0]], scores[name], group),
                _constant(first, group),
            )
            for group, name, mean, other, gap in rows
        ]
    return found


class Primary(NamedTuple):
    """What one training scores in the metric that the verdict is about."""

    value: float
    unit: str
    lower_is_better: bool


def primary(scores: RunScores) -> Primary:
    """Right answers where all corpora ask questions, else bits per byte; of everything."""
    if len(scores.answers) == len(scores.corpora):
        return Primary(float(right_SI([scores], list(scores.answers)).mean()), ACCURACY, False)
    own_SI, weight_I = bits_SI([scores], list(scores.corpora))
    return Primary(float(own_SI[0] @ weight_I / weight_I.sum()), BITS, True)


def best_of(found: Mapping[str, Primary], count: int) -> set[str]:
    """The names of the best ones; of equal ones the first."""
    ranked = sorted(
        found, key=lambda name: found[name].value * (1 if found[name].lower_is_better else -1)
    )
    return set(ranked[:count])


def _groups(unit: str, corpora: Sequence[str]) -> list[_Group]:
    whole = [_Group(unit, unit, corpora)] if corpora else []
    single = [_Group(f"{unit}: {name}", unit, [name]) for name in corpora]
    return whole + (single if len(corpora) > 1 else [])


def _pair(
    reference: Sequence[RunScores], contender: Sequence[RunScores], group: _Group, family: int
) -> tuple[float, float, Effect]:
    if group.unit == ACCURACY:
        a_SI, b_SI = right_SI(reference, group.corpora), right_SI(contender, group.corpora)
        weight_I = np.ones(a_SI.shape[1])
        strata_I = levels_I(reference[0], group.corpora)
    else:
        a_SI, weight_I = bits_SI(reference, group.corpora)
        b_SI, _ = bits_SI(contender, group.corpora)
        strata_I = kinds_I(reference[0], group.corpora)
    share_I = weight_I / weight_I.sum()
    means = (float((a_SI @ share_I).mean()), float((b_SI @ share_I).mean()))
    return (*means, effect(b_SI - a_SI, weight_I, strata_I, family=family))


def _mcnemar(
    reference: Sequence[RunScores], contender: Sequence[RunScores], group: _Group
) -> list[float] | None:
    """Of every pair of models; None where there are no right and wrong answers."""
    if group.unit != ACCURACY:
        return None
    a_SI, b_SI = (right_SI(runs, group.corpora) > 0 for runs in (reference, contender))
    return [mcnemar(b_I, a_I) for a_I, b_I in zip(a_SI, b_SI, strict=True)]


def _constant(first: RunScores, group: _Group) -> float | None:
    """What one answer for each corpus would get right."""
    if group.unit != ACCURACY:
        return None
    asked = [first.answers[name] for name in group.corpora]
    count = sum(len(one.right) for one in asked)
    return sum(one.constant * len(one.right) for one in asked) / count


def _metric(
    group: _Group,
    name: str,
    means: tuple[float, float],
    found: Effect,
    p_holm: float | None,
    by_seed: list[float] | None,
    constant: float | None,
) -> ComparedMetric:
    lower_is_better = group.unit == BITS
    outcome: Literal["better", "worse", "not enough evidence"] = "not enough evidence"
    # equal to the last bit is no evidence either, whatever its p
    if p_holm is not None and p_holm < LEVEL and found.value:
        outcome = "better" if (found.value < 0) == lower_is_better else "worse"
    return ComparedMetric(
        name=group.title,
        unit=group.unit,
        contender=name,
        lower_is_better=lower_is_better,
        items=found.items,
        seeds=found.seeds,
        reference_mean=means[0],
        contender_mean=means[1],
        constant_answer=constant,
        mcnemar=by_seed,
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
