"""What the difference of two designs is known to be, over seeds and over items.

Two designs are trained with some seeds each and score the same items (documents, questions). A
difference has two sources of chance that cross: another seed gives other models, other items ask
other things. An interval that only knows the items speaks of these very models, one that only knows
the seeds of these very texts. Here it is over both: the variance that drawing seeds and items again
would give (the crossed bootstrap of Owen 2007, arXiv 0712.1111, in closed form), and what items and
seeds share is not counted twice, as in Clark's quasi-F (1973). A few seeds make a standard error
that is itself uncertain: each part is multiplied by the quantile of Student's distribution that
belongs to it (Graybill and Wang 1980). Satterthwaite's degrees of freedom would be too many
wherever the seeds, or a few items, happen to lie close together.

Items of several kinds (documents of corpora, questions by level) are drawn within their kind: how
many there are of each is no accident, and what one kind differs by from another is no noise.

Shapes: S seeds, I items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

Array = npt.NDArray[np.float64]
LEVEL = 0.95
"""Of the intervals."""
POWER = 0.8
"""With which a difference counts as one that would have been found."""
FLIPS = 9999
MOST_SEEDS = 1000
LEAST_OF_KIND = 10
"""Items; of fewer their own variance is hardly known."""
SLICES, FEW_SLICES = 400, 60
"""Of a distribution, where a mean over it is taken: alone, and within another one."""
MANY = 10**6
"""Degrees of freedom at which Student's distribution is the normal one."""
ROUNDING = 1e-12
"""A standard error that is so small beside the differences is zero."""


class Effect(NamedTuple):
    """A mean difference, and what is known of it. None: one seed and one item can't tell."""

    value: float
    """Mean over seeds, of items by their weight."""
    seeds: int
    items: int
    low: float | None = None
    """The 95 % interval, over other seeds and other items."""
    high: float | None = None
    p: float | None = None
    """Of a difference as large if there were none, over other seeds and other items."""
    p_items: float | None = None
    """The same for these very models and other items: signs of the items are flipped."""
    standard_error: float | None = None
    degrees: float | None = None
    """Degrees of freedom of Student's distribution that has the interval's half as its quantile."""
    from_seeds: float | None = None
    """The share of the squared standard error that comes from the seeds; the rest is the items'."""
    effect_size: float | None = None
    """The mean over the standard deviation of the seeds' means (Cohen's d of pairs)."""
    detectable: float | None = None
    """The smallest true difference that so many seeds and items find four times in five, the
    present standard error being as uncertain as it is."""
    seeds_needed: int | None = None
    """Seeds that would find a difference like this one with that power; None: more than 1,000, or
    more items are needed first."""

    @property
    def found(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


class _Parts(NamedTuple):
    """Of the squared standard error."""

    seeds: float
    items: float
    """Beyond what the seeds' part has of it already."""
    item_quantile: float
    """Student's, of the items' part."""


def effect(
    differences_SI: Array,
    weights_I: Array | None = None,
    strata_I: npt.NDArray[np.int64] | None = None,
    *,
    family: int = 1,
    seed: int = 0,
) -> Effect:
    """What differences say that are paired by seed and by item.

    Args:
        differences_SI: one design's score less the other's.
        weights_I: what items count, such as their bytes; left out, all alike.
        strata_I: the kind of each item, any numbers; left out, all are of one.
        family: differences that are tested together; each has so much less of a chance to be found.
        seed: of the signs that are flipped.

    Raises:
        ValueError: there is no difference, or one that is not finite.
    """
    d_SI = np.asarray(differences_SI, dtype=np.float64)
    S, num_items = d_SI.shape
    w_I = np.ones(num_items) if weights_I is None else np.asarray(weights_I, dtype=np.float64)
    if not d_SI.size or not np.isfinite(d_SI).all() or not np.isfinite(w_I).all():
        raise ValueError("differences are finite numbers, at least one")
    if (w_I <= 0).any():
        raise ValueError("weights are positive")
    w_I = w_I / w_I.sum()
    kinds_I = np.zeros(num_items, np.int64) if strata_I is None else np.asarray(strata_I)
    means_S = d_SI @ w_I
    value = float(means_S.mean())
    rng = np.random.default_rng([seed, S, num_items])
    p_items = _flipped(d_SI.mean(0) * w_I, rng) if num_items > 1 else None
    nothing = Effect(value, S, num_items, p_items=p_items)
    # one seed says nothing of others, and one item neither
    if S < 2:
        return nothing
    if num_items < 2:
        return nothing
    parts = _variances(d_SI, w_I, kinds_I)
    if math.sqrt(parts.seeds + parts.items) <= ROUNDING * float(np.abs(d_SI).max()):
        # each kind of items is alike to the last bit: all of them together may not be
        parts = _variances(d_SI, w_I, np.zeros_like(kinds_I))
    error, degrees = _error(parts, S)
    if error <= ROUNDING * float(np.abs(d_SI).max()):
        if value == 0:
            return nothing._replace(low=0.0, high=0.0, p=1.0, standard_error=0.0)
        # there is no spread to measure a difference by: signs alone tell
        return nothing._replace(p=p_items, standard_error=0.0)
    half = _quantile(degrees) * error
    spread = math.sqrt(parts.seeds * S)
    return nothing._replace(
        low=value - half,
        high=value + half,
        p=float(2 * stats.t.sf(abs(value) / error, degrees)),
        standard_error=error,
        degrees=degrees,
        from_seeds=parts.seeds / (parts.seeds + parts.items),
        effect_size=value / spread if spread > ROUNDING * abs(value) else None,
        detectable=_detectable(error, degrees, family),
        seeds_needed=_seeds_needed(value, parts, S, degrees, family),
    )


def _variances(d_SI: Array, w_I: Array, kinds_I: npt.NDArray[np.int64]) -> _Parts:
    """Variances of the mean over other seeds, and over other items of the same kinds."""
    S = d_SI.shape[0]
    means_S = d_SI @ w_I
    items = total = squares = 0.0
    for own_I in _strata(kinds_I):
        share = float(w_I[own_I].sum())
        weights_I = w_I[own_I] / share
        variance, shared = _of_items(d_SI[:, own_I], weights_I)
        items += share**2 * (variance - shared)
        total += share**2 * variance
        # items of unequal size are fewer than they look: the largest ones are most of the text
        degrees = max(1.0, 1 / float((weights_I**2).sum()) - 1)
        squares += share**2 * variance * _quantile(degrees) ** 2
    quantile = math.sqrt(squares / total) if total else _quantile(max(1, d_SI.shape[1] - 1))
    return _Parts(float(means_S.var(ddof=1)) / S, max(0.0, items), quantile)


def _strata(kinds_I: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Which items are of each kind; those of kinds with few items are together.

    Their variance is then too large rather than hardly known.
    """
    found = [np.flatnonzero(kinds_I == kind) for kind in np.unique(kinds_I)]
    while len(found) > 1:
        found.sort(key=len)
        if len(found[0]) >= LEAST_OF_KIND:
            break
        found = [np.concatenate(found[:2]), *found[2:]]
    return found


def _of_items(d_SI: Array, w_I: Array) -> tuple[float, float]:
    """The variance of a weighted mean over other items, and how much of it belongs to a seed and
    an item together."""
    S, num_items = d_SI.shape
    if num_items == 1:
        return 0.0, 0.0
    means_S, means_I = d_SI @ w_I, d_SI.mean(0)
    # what lies around a mean that it pulls to itself is less than what lies around the true one
    q, cubes = float((w_I**2).sum()), float((w_I**3).sum())
    factor = q / (q - 2 * cubes + q**2)
    value = float(means_S.mean())
    variance = float(w_I**2 @ (means_I - value) ** 2) * factor
    # what belongs to a seed and an item together is in it; its expectation is known
    rest_SI = d_SI - means_S[:, None] - means_I + value
    shared = float((rest_SI**2 @ w_I**2).sum()) * factor / (S - 1) / S
    return variance, shared


def _error(parts: _Parts, S: int) -> tuple[float, float]:
    """The standard error, and the degrees of freedom that make its interval as wide as both parts,
    each with its own."""
    total = parts.seeds + parts.items
    if total == 0 or parts.items == 0:
        return math.sqrt(total), S - 1.0
    of_seeds = _quantile(S - 1)
    squared = (of_seeds**2 * parts.seeds + parts.item_quantile**2 * parts.items) / total
    return math.sqrt(total), _degrees(math.sqrt(squared))


def _degrees(quantile: float) -> float:
    """The degrees of freedom that have this quantile, from one to very many."""
    if quantile >= _quantile(1):
        return 1.0
    if quantile <= _quantile(MANY):
        return float(MANY)
    return float(optimize.brentq(lambda n: _quantile(n) - quantile, 1, MANY))


def _quantile(degrees: float) -> float:
    """Student's, for the interval's level."""
    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


def _power(true_K: Array, error: float, degrees: float, family: int = 1) -> float:
    """The chance that a true difference is found among a family of them, at worst, where the true
    standard error is known; the mean over several true differences.

    Over the middle of each slice of what the measured error may come out as: the non-central
    distribution of libraries is not a number for some degrees that are no integers.
    """
    bound = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / family, degrees))
    bounds = bound * _scales(degrees, SLICES)
    shift_K1 = np.abs(true_K)[:, None] / error
    return float((special.ndtr(shift_K1 - bounds) + special.ndtr(-shift_K1 - bounds)).mean())


def _scales(degrees: float, count: int) -> Array:
    """A measured standard error over the true one: the middle of each slice of what it may be."""
    middles = (np.arange(count) + 0.5) / count
    return np.asarray(np.sqrt(stats.chi2.ppf(middles, degrees) / degrees), dtype=np.float64)


def _detectable(error: float, degrees: float, family: int = 1) -> float:
    """In units of the measured error, which is as uncertain as it is: over comparisons like this
    one, a true difference of what each of them says is found four times in five."""
    scales = _scales(degrees, FEW_SLICES)
    low, high = 0.0, 1.0
    while _power(high * scales, 1.0, degrees, family) < POWER:
        high *= 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        enough = _power(middle * scales, 1.0, degrees, family) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high * error


def _seeds_needed(value: float, parts: _Parts, S: int, degrees: float, family: int) -> int | None:
    """The least number of seeds; the items' part stays as it is."""
    value_K = value * _scales(degrees, FEW_SLICES)

    def enough(n: int) -> bool:
        error, then = _error(parts._replace(seeds=parts.seeds * S / n), n)
        return error == 0 or _power(value_K, error, then, family) >= POWER

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _flipped(parts_I: Array, rng: np.random.Generator) -> float:
    """The share of random signs that give a sum as far from zero; exact where there are few."""
    total = abs(float(parts_I.sum()))
    # the same numbers in another order may differ in their last bits
    total -= 1e-12 * float(np.abs(parts_I).sum())
    n = len(parts_I)
    if n <= 12:
        codes = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float((np.abs((1 - 2 * codes) @ parts_I) >= total).mean())
    count = 0
    for _ in range(0, FLIPS, 999):
        signs = rng.integers(0, 2, (999, n), dtype=np.int8) * 2 - 1
        count += int((np.abs(signs @ parts_I) >= total).sum())
    return (1 + count) / (1 + -(-FLIPS // 999) * 999)


def mcnemar(left_I: npt.NDArray[np.bool_], right_I: npt.NDArray[np.bool_]) -> float:
    """The exact two-sided p of two models' right and wrong answers to the same questions."""
    only_left = int((left_I & ~right_I).sum())
    only_right = int((~left_I & right_I).sum())
    if only_left + only_right == 0:
        return 1.0
    return float(stats.binomtest(only_left, only_left + only_right).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """The same, corrected for their number (Holm 1979): the chance that any of them errs."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = worst
    return corrected
