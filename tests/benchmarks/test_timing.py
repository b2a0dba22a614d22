"""Interleaving, medians and ratios, on a clock that the test turns."""

from __future__ import annotations

import pytest

from benchmarks.timing import Spread, Timing, best, side_by_side


class Clock:
    """Time passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *seconds: float) -> object:
        """Takes these seconds in turn, the last of them for ever."""
        left = list(seconds)

        def work() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


def quiet(text: str) -> None:
    """Tells nobody."""


def test_rounds_alternate_and_the_first_call_is_told_apart() -> None:
    clock = Clock()
    peers = {"a": clock.worker("a", 9.0, 1.0), "b": clock.worker("b", 2.0)}
    timings = side_by_side(
        peers,  # type: ignore[arg-type]
        repeats=3,
        announce=quiet,
        clock=clock,
        sample_seconds=0.5,
    )
    assert clock.log == [*"aabb", *"ab", *"ba", *"ab"]
    assert timings["a"] == Timing((1.0, 1.0, 1.0), 9.0)
    assert timings["b"] == Timing((2.0, 2.0, 2.0), 2.0)


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    clock = Clock()
    timings = side_by_side(
        {"a": clock.worker("a", 0.01)},  # type: ignore[dict-item]
        repeats=2,
        announce=quiet,
        clock=clock,
        sample_seconds=0.1,
    )
    assert len(clock.log) == 2 + 2 * 10
    assert timings["a"].spread.median == pytest.approx(0.01)


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    # the machine is three times slower in the second round: the ratio does not notice
    ours, theirs = Timing((1.0, 3.0, 1.0), 0), Timing((2.0, 6.0, 2.5), 0)
    assert ours.times_faster_than(theirs) == pytest.approx((2.0, 2.0, 2.4))
    with pytest.raises(ValueError, match="same rounds"):
        ours.times_faster_than(Timing((1.0,), 0))


def test_spread_and_rates() -> None:
    assert Spread.of(range(11)) == (5, 1, 9)
    assert Spread.of([7.0]) == (7, 7, 7)
    assert Timing((0.5, 0.25, 1.0), 0).rate(4) == pytest.approx((8, 4.8, 14.4))


def test_best_is_the_smallest_median() -> None:
    timings = {"slow": Timing((1.0, 4.0, 4.0), 0), "fast": Timing((2.0, 3.0, 9.0), 0)}
    assert best(timings)[0] == "fast"


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warm_up": 0}])
def test_nothing_to_measure_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        side_by_side({}, announce=quiet, **{"repeats": 1, **wrong})
