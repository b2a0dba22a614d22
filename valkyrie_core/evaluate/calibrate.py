"""A threshold with a guarantee: Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052), as in
CALM (2207.07061).

Thresholds are tried from the most careful one on. For each, rows that no training saw say how often
stopping early made a right answer wrong; that its true risk is above `risk` is rejected where so
few errors had a chance of at most `delta`. The walk ends at the first threshold that is not
rejected: so many tests in that fixed order need no correction. Of several corpora each has to hold
by itself, so that the promise is about every one of them; the largest p of all then needs no
correction either. A row is a question or a document, never a token: tokens of a document err
together, and the bound would be void.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Tried(NamedTuple):
    """One threshold on the calibration rows."""

    threshold: float
    risk: float
    """The mean loss of a row, of the corpus where it is highest."""
    p: float
    """Of so little, were the true risk as high as allowed; the highest of all corpora."""
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
    losses_at: Callable[[float], tuple[Sequence[Sequence[float]], float]],
    *,
    risk: float,
    delta: float,
) -> Chosen:
    """Walks down the thresholds as long as they hold.

    Args:
        losses_at: of a threshold: the loss of every calibration row, 0 to 1, by corpus; and the
            mean depth.
        risk: the mean loss that is allowed.
        delta: the chance that is taken of allowing more.
    """
    tried, held = list[Tried](), None
    for threshold in thresholds:
        losses, steps = losses_at(threshold)
        p = max(p_value(own, risk) for own in losses)
        found = Tried(threshold, highest(losses), p, steps)
        tried.append(found)
        if found.p > delta:
            break
        held = threshold
    return Chosen(held, tuple(tried))


def highest(losses: Sequence[Sequence[float]]) -> float:
    """The mean loss of the corpus where it is highest."""
    return max(sum(own) / len(own) for own in losses)


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
    if not errors:
        return max(1, math.ceil(math.log(delta) / math.log1p(-risk)))
    low, high = errors, 2 * errors
    while binomial_tail(errors, high, risk) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if binomial_tail(errors, middle, risk) > delta else (low, middle)
    return high


def _divergence(mean: float, risk: float) -> float:
    """KL of two coins, in nats."""
    first = 0.0 if mean == 0 else mean * math.log(mean / risk)
    return first + (1 - mean) * math.log((1 - mean) / (1 - risk))
