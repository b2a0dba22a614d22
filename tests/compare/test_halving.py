"""What a budget has room for, by hand."""

from __future__ import annotations

import pytest

from valkyrie_core.compare.halving import Rung, rungs, seconds_of
from valkyrie_core.compare.verdict import Primary, best_of
from valkyrie_core.errors import UsageError


def alike(count: int, seconds: float = 10.0) -> dict[str, float]:
    return {f"d{number}": seconds for number in range(count)}


def test_all_that_fits_is_trained() -> None:
    assert rungs(alike(4), 3, 120) == []
    assert rungs(alike(4), 3, 119) != []


def test_half_goes_on_with_twice_the_steps() -> None:
    # one of eight is left beside the reference: 7 x 1/8, 4 x 1/4 and 2 x 1/2 of 10 s, and 60 s
    found = rungs(alike(8), 3, 88.75)
    assert found == [Rung(1 / 8, 4), Rung(1 / 4, 2), Rung(1 / 2, 1)]
    # a second more lets no other one in, but thirty do
    assert rungs(alike(8), 3, 90) == found
    assert rungs(alike(8), 3, 120)[-1].keep == 2


def test_where_half_the_steps_are_too_many_a_quarter_may_do() -> None:
    assert rungs(alike(3), 3, 70) == [Rung(1 / 2, 1)]
    assert rungs(alike(3), 3, 65) == [Rung(1 / 4, 1)]
    assert rungs(alike(3), 3, 63) == [Rung(1 / 8, 1)]


def test_rounds_have_some_steps() -> None:
    # an eighth and a quarter of 30 steps are fewer than ten: one round, as long as has to be
    found = rungs(alike(8), 3, 100, steps=30)
    assert found == [Rung(1 / 3, 2), Rung(1 / 2, 1)]
    # where even half the steps are too few, whole trainings decide
    assert rungs(alike(8), 3, 140, steps=5) == [Rung(1.0, 1)]


def test_the_dearest_may_be_the_best() -> None:
    seconds = {"reference": 10.0, "cheap": 10.0, "dear": 20.0}
    # the dear one has to fit: 3 x (10 + 20) + (10 + 20) / 8
    with pytest.raises(UsageError, match="too little"):
        rungs(seconds, 3, 93)
    assert rungs(seconds, 3, 94) == [Rung(1 / 8, 1)]


def test_what_does_not_fit_is_told_with_what_would() -> None:
    with pytest.raises(UsageError, match="1m is too little") as caught:
        rungs(alike(4, 100.0), 2, 60)
    assert caught.value.hint is not None
    least = seconds_of(caught.value.hint.split()[1].rstrip(","))
    assert rungs(alike(4, 100.0), 2, least)
    with pytest.raises(UsageError) as caught:
        rungs(alike(2, 100.0), 2, 60)
    assert "rounds" not in caught.value.message
    assert caught.value.hint is not None
    assert rungs(alike(2, 100.0), 2, seconds_of(caught.value.hint.split()[1].rstrip(","))) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20m", 1200), ("1h30m", 5400), ("90s", 90), ("90", 90), (" 1.5h ", 5400), ("2m5s", 125)],
)
def test_spans_of_time(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "m", "0", "0m", "-1m", "1d", "20 m in", "nan", "inf", "1e3", "1h30"],
)
def test_what_is_no_span_of_time(text: str) -> None:
    with pytest.raises(UsageError, match="no span of time"):
        seconds_of(text)


def test_a_span_of_time_is_finite_and_plain() -> None:
    for text in ("9" * 400 + "h", "\uff11\uff12m"):
        with pytest.raises(UsageError, match="no span of time"):
            seconds_of(text)


def test_the_best_ones() -> None:
    bits = {
        name: Primary(value, "bits per byte", True)
        for name, value in [("a", 2.0), ("b", 1.0), ("c", 2.0), ("d", 3.0)]
    }
    assert best_of(bits, 2) == {"b", "a"}
    right = {name: one._replace(lower_is_better=False) for name, one in bits.items()}
    assert best_of(right, 2) == {"d", "a"}
