"""Learn then Test: the promise holds, as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from valkyrie_core.evaluate.calibrate import (
    THRESHOLDS,
    Tried,
    binomial_tail,
    learn_then_test,
    p_value,
    rows_needed,
)


def test_the_binomial_tail_is_the_sum_of_its_terms() -> None:
    for n, risk, errors in ((5, 0.3, 2), (60, 0.02, 0), (200, 0.1, 15)):
        exact = sum(math.comb(n, k) * risk**k * (1 - risk) ** (n - k) for k in range(errors + 1))
        assert binomial_tail(errors, n, risk) == pytest.approx(exact)
    assert binomial_tail(10, 10, 0.4) == pytest.approx(1)
    assert p_value([0, 1, 0, 0], 0.5) == pytest.approx(binomial_tail(1, 4, 0.5))


def test_rows_that_it_takes() -> None:
    # with two percent and one chance in twenty
    assert [rows_needed(0.02, 0.05, errors) for errors in (0, 1, 2, 5, 10)] == [
        149, 236, 313, 523, 845,
    ]  # fmt: skip


def test_rows_are_not_counted_one_by_one() -> None:
    assert rows_needed(1e-300, 0.05) > 1e300
    for errors in (0, 1, 4):
        fewest = rows_needed(0.1, 0.05, errors)
        assert binomial_tail(errors, fewest, 0.1) <= 0.05 < binomial_tail(errors, fewest - 1, 0.1)


def test_shares_have_a_bound_of_their_own() -> None:
    losses = [0.01] * 400
    assert p_value(losses, 0.005) == 1
    assert p_value(losses, 0.05) < 0.05
    # never more daring than what is known of coins with the same mean
    assert p_value(losses, 0.05) >= binomial_tail(4, 400, 0.05)


def walk(risks: list[float], n: int, draw: np.random.Generator, risk: float, delta: float) -> float:
    """The true risk of the threshold that is chosen, where each has a true risk of its own."""
    luck = draw.random(n)
    thresholds = [float(i) for i in range(len(risks))]

    def losses_at(threshold: float) -> tuple[list[list[float]], float]:
        return [[float(u < risks[int(threshold)]) for u in luck]], 1.0

    chosen = learn_then_test(thresholds, losses_at, risk=risk, delta=delta).threshold
    return 0.0 if chosen is None else risks[int(chosen)]


def test_the_promise_is_kept_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    risks = [0.0, 0.005, 0.01, 0.018, 0.0201, 0.03, 0.06]
    broken = sum(walk(risks, 800, draw, 0.02, 0.05) > 0.02 for _ in range(2000))
    # one in twenty of 2000 is 100, and chance adds or takes some
    assert broken < 100 + 3 * math.sqrt(95)
    # and it is no empty one: the careful half of the thresholds is found
    found = [walk(risks, 800, draw, 0.02, 0.05) for _ in range(300)]
    assert np.mean(found) > 0.004


def test_the_walk_ends_at_the_first_that_does_not_hold() -> None:
    tables = {0.9: [0.0] * 200, 0.8: [1.0] * 50 + [0.0] * 150, 0.7: [0.0] * 200}
    asked = []

    def losses_at(threshold: float) -> tuple[list[list[float]], float]:
        asked.append(threshold)
        return [tables[threshold]], threshold

    chosen = learn_then_test((0.9, 0.8, 0.7), losses_at, risk=0.02, delta=0.05)
    assert chosen.threshold == 0.9
    assert asked == [0.9, 0.8]
    assert chosen.tried[0] == Tried(0.9, 0.0, pytest.approx(0.98**200), 0.9)
    assert learn_then_test((0.8,), losses_at, risk=0.02, delta=0.05).threshold is None


def test_thresholds_go_from_careful_to_daring() -> None:
    assert list(THRESHOLDS) == sorted(THRESHOLDS, reverse=True)
    assert 0.999 < THRESHOLDS[0] < 1
    assert 0 < THRESHOLDS[-1] < 0.1


def test_every_corpus_has_to_hold_by_itself() -> None:
    # 2 % of all rows together, and 20 % of the smaller corpus
    losses = [[0.0] * 900, [1.0] * 20 + [0.0] * 80]

    def losses_at(threshold: float) -> tuple[list[list[float]], float]:
        return losses, 1.0

    found = learn_then_test((0.9,), losses_at, risk=0.05, delta=0.05)
    assert p_value([x for own in losses for x in own], 0.05) < 0.05
    assert found.threshold is None
    assert found.tried[0].risk == 0.2
    assert found.tried[0].p == p_value(losses[1], 0.05)
