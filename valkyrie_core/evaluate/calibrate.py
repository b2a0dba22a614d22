"""A threshold with a guarantee: Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052), as in
CALM (2207.07061).

Thresholds are tried from the most careful one on. For each, rows that no training saw say how often
stopping early made a right answer wrong; that its true risk is above `risk` is rejected where so
few errors had a chance of at most `delta`. The walk ends at the first threshold that is not
rejected: so many tests in that fixed order need no correction. A row is a question or a document,
never a token: tokens of a document err together, and the bound would be void.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Tried(NamedTuple):
    """One threshold on the calibration rows."""

    threshold: float
    risk: float
    """The mean loss of a row."""
    p: float
    """Of so little, were the true risk as high as allowed."""
    steps: float
    """Mean depth."""


class Chosen(NamedTuple):
    """What the walk came to."""

    threshold: float | None
    """None: no threshold holds, and full depth is kept."""
    tried: tuple[Tried, ...]
    """In order; all but perhaps the last one hold."""


THRESHOLDS = tuple(1 / (1 + math.exp(-x / 2)) for x in range(18, -7, -1))
"""Of a confidence, the most careful first: logits from 9 to -3."""


def learn_then_test(
    thresholds: Sequence[float],
    losses_at: Callable[[float], tuple[Sequence[float], float]],
    *,
    risk: float,
    delta: float,
) -> Chosen:
    """Walks down the thresholds as long as they hold.

    Args:
        losses_at: of a threshold: the loss of every calibration row, 0 to 1, and the mean depth.
        risk: the mean loss that is allowed.
        delta: the chance that is taken of allowing more.
    """
    tried, held = list[Tried](), None
    for threshold in thresholds:
        losses, steps = losses_at(threshold)
        found = Tried(threshold, sum(losses) / len(losses), p_value(losses, risk), steps)
        tried.append(found)
        if found.p > delta:
            break
        held = threshold
    return Chosen(held, tuple(tried))


def p_value(losses: Sequence[float], risk: float) -> float:
    """The chance of so small a mean loss, were the true one `risk`: the binomial tail where every
    loss is 0 or 1, else the bound of Hoeffding and Bentkus (Bates et al. 2021, arXiv 2101.02703).
    """
    n, mean = len(losses), sum(losses) / len(losses)
    if all(loss in (0, 1) for loss in losses):
        return binomial_tail(round(sum(losses)), n, risk)
    if mean >= risk:
        return 1.0
    bentkus = math.e * binomial_tail(math.ceil(sum(losses)), n, risk)
    return min(1.0, math.exp(-n * _divergence(mean, risk)), bentkus)


def binomial_tail(errors: int, n: int, risk: float) -> float:
    """P(Bin(n, risk) <= errors)."""
    log_risk, log_rest = math.log(risk), math.log1p(-risk)
    return min(
        1.0,
        math.fsum(
            math.exp(
                math.lgamma(n + 1)
                - math.lgamma(k + 1)
                - math.lgamma(n - k + 1)
                + k * log_risk
                + (n - k) * log_rest
            )
            for k in range(errors + 1)
        ),
    )


def rows_needed(risk: float, delta: float, errors: int = 0) -> int:
    """The fewest rows with which so many errors still hold."""
    n = max(1, errors)
    while binomial_tail(errors, n, risk) > delta:
        n += 1
    return n


def _divergence(mean: float, risk: float) -> float:
    """KL of two coins, in nats."""
    first = 0.0 if mean == 0 else mean * math.log(mean / risk)
    return first + (1 - mean) * math.log((1 - mean) / (1 - risk))
