"""Means over a few seeds, with what is not known about them.

Intervals are Student's, 95 %, two-sided: with three seeds they are 2.5 standard deviations wide to
each side, which is honest and says how little three seeds are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's 97.5 % quantiles for 1, 2, ... degrees of freedom."""
NORMAL_95 = 1.96
MOST_SEEDS = 1000


class Mean(NamedTuple):
    """A mean over seeds."""

    value: float
    half_width: float | None
    """The 95 % interval reaches so far to each side; None for one seed."""
    seeds: int

    @property
    def reaches_zero(self) -> bool:
        """Whether zero lies in the interval; one seed can't exclude anything."""
        return self.half_width is None or abs(self.value) <= self.half_width


def quantile(degrees: int) -> float:
    """Student's 97.5 % quantile; from 21 degrees on a little too small, by less than 6 %."""
    return T_95[degrees - 1] if degrees <= len(T_95) else NORMAL_95


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least one value."""
    n = len(values)
    if n == 1:
        return Mean(values[0], None, 1)
    half = quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Mean(statistics.fmean(values), half, n)


def difference(left: Sequence[float], right: Sequence[float]) -> Mean:
    """The mean of left - right, paired by seed: what both share by their seed cancels."""
    return mean_of([a - b for a, b in zip(left, right, strict=True)])


def seeds_needed(values: Sequence[float]) -> int | None:
    """How many seeds would exclude zero, if mean and spread stay as they are; None: too many."""
    if len(values) < 2:
        return 3
    value, spread = abs(statistics.fmean(values)), statistics.stdev(values)
    for n in range(len(values) + 1, MOST_SEEDS + 1):
        if quantile(n - 1) * spread / math.sqrt(n) < value:
            return n
    return None
