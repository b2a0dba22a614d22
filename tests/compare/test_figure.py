"""The Pareto front of a picture, by hand."""

from __future__ import annotations

from valkyrie_core.compare.figure import unbeaten


def test_the_unbeaten_are_those_that_pay_for_more() -> None:
    cost = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 3.0, "e": 4.0}
    bits = {"a": 2.0, "b": 2.5, "c": 1.5, "d": 1.6, "e": 1.4}
    assert unbeaten(cost, bits, lower_is_better=True) == ["a", "c", "e"]
    right = {name: 1 - value / 10 for name, value in bits.items()}
    assert unbeaten(cost, right, lower_is_better=False) == ["a", "c", "e"]
    assert unbeaten({"a": 1.0}, {"a": 2.0}, lower_is_better=True) == ["a"]


def test_steps_that_were_rounded_make_nobody_cheaper() -> None:
    cost = {"a": 100.0, "b": 101.0}
    assert unbeaten(cost, {"a": 2.0, "b": 1.0}, lower_is_better=True) == ["b"]
    assert unbeaten(cost, {"a": 1.0, "b": 2.0}, lower_is_better=True) == ["a"]
