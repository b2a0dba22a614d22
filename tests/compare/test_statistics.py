"""Statistics of comparisons: ties stay ties, promised power is there, and small cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from valkyrie_core.compare import statistics
from valkyrie_core.compare.statistics import Array, effect, holm, mcnemar

TIES = {
    "seeds decide": (3, 40, 1.0, 0.0, 0.1),
    "items decide": (3, 40, 0.05, 3.0, 1.0),
    "both": (3, 40, 1.0, 3.0, 1.0),
    "neither": (3, 40, 0.0, 0.0, 1.0),
    "five seeds": (5, 30, 0.3, 1.0, 3.0),
}
"""Seeds, items, and the standard deviations of seeds, of items, and of what is left."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "FLIPS", 999)


def drawn(case: tuple[int, int, float, float, float], rng: np.random.Generator) -> Array:
    """Differences of two designs that do not differ."""
    S, num_items, seeds, items, rest = case
    return (
        rng.normal(0, seeds, (S, 1))
        + rng.normal(0, items, (1, num_items))
        + rng.normal(0, rest, (S, num_items))
    )


@pytest.mark.slow
def test_ties_are_found_to_differ_in_less_than_a_twentieth() -> None:
    rng = np.random.default_rng(0)
    found = {
        name: sum(effect(drawn(case, rng)).found for _ in range(400)) / 400
        for name, case in TIES.items()
    }
    assert sum(found.values()) / len(found) < 0.05
    # each within what 400 draws of a twentieth may be
    assert all(share < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 400) for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize(("num_items", "spread"), [(10, 1.0), (20, 1.5), (60, 1.5)])
def test_ties_of_items_that_differ_in_size(num_items: int, spread: float) -> None:
    """A few documents that are most of the text: fewer items than it looks."""
    rng = np.random.default_rng(num_items)
    found = 0
    for _ in range(300):
        sizes_I = rng.lognormal(0, spread, num_items)
        d_SI = rng.normal(0, 1, (1, num_items)) + rng.normal(0, 0.05, (3, num_items))
        found += effect(d_SI, sizes_I).found
    assert found / 300 < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 300)


def of_kinds(rng: np.random.Generator, num_items: int, apart: float) -> tuple[Array, Array]:
    """Differences over items of two kinds that favour a design each, and cancel; which is which."""
    kinds_I = np.arange(num_items) % 2
    seeds_SK = rng.normal(0, 0.03, (3, 2))
    d_SI = rng.normal(0, 0.3, (1, num_items)) + rng.normal(0, 0.1, (3, num_items))
    return d_SI + seeds_SK[:, kinds_I] + apart * (1 - 2 * kinds_I), kinds_I


@pytest.mark.slow
@pytest.mark.parametrize("num_items", [20, 40])
def test_ties_of_items_of_two_kinds(num_items: int) -> None:
    rng = np.random.default_rng(num_items)
    found = 0
    for _ in range(600):
        d_SI, kinds_I = of_kinds(rng, num_items, 1.0)
        found += effect(d_SI, strata_I=kinds_I).found
    assert found / 600 < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 600)


@pytest.mark.slow
@pytest.mark.parametrize("few", [2, 3, 4, 10])
def test_ties_where_a_kind_of_few_items_is_half_of_the_text(few: int) -> None:
    rng = np.random.default_rng(few)
    kinds_I = np.array([0] * few + [1] * 40)
    weights_I = np.where(kinds_I == 0, 40 / few, 1.0)
    found = 0
    for _ in range(600):
        d_SI = rng.normal(0, 1, (1, few + 40)) + rng.normal(0, 0.1, (3, few + 40))
        found += effect(d_SI, weights_I, kinds_I).found
    assert found / 600 < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 600)


@pytest.mark.slow
def test_ties_of_questions_of_which_two_levels_are_too_easy() -> None:
    """38 questions that all answer, and two that nobody knows."""
    rng = np.random.default_rng(9)
    kinds_I = np.array([0] * 38 + [1] * 2)
    found = 0
    for _ in range(600):
        d_SI = np.zeros((3, 40))
        d_SI[:, 38:] = rng.integers(0, 2, (1, 2)) - rng.integers(0, 2, (1, 2))
        p = effect(d_SI, strata_I=kinds_I).p
        found += p is not None and p < 0.05
    assert found / 600 < 0.05


def test_what_kinds_differ_by_is_no_noise() -> None:
    d_SI, kinds_I = of_kinds(np.random.default_rng(6), 40, 1.0)
    apart, together = effect(d_SI, strata_I=kinds_I), effect(d_SI)
    assert apart.value == together.value
    assert apart.standard_error is not None
    assert together.standard_error is not None
    assert apart.standard_error < 0.5 * together.standard_error
    # and where kinds do not differ, kinds change little
    alike_SI, kinds_I = of_kinds(np.random.default_rng(6), 40, 0.0)
    found = effect(alike_SI, strata_I=kinds_I)
    assert found.standard_error == pytest.approx(effect(alike_SI).standard_error, rel=0.1)


def test_an_item_that_is_alone_of_its_kind() -> None:
    d_SI = np.random.default_rng(7).normal(0, 1, (3, 36))
    kinds_I = np.array([4] * 20 + [7] * 1 + [9] * 15)
    found_strata = [sorted(own.tolist()) for own in statistics._strata(kinds_I)]
    assert sorted(found_strata) == [list(range(20)), list(range(20, 36))]
    found = effect(d_SI, strata_I=kinds_I)
    assert found.standard_error is not None
    assert found.standard_error > 0
    # all alone: nearly as if there were no kinds
    alone = effect(d_SI, strata_I=np.arange(36))
    assert alone.standard_error == pytest.approx(effect(d_SI).standard_error, rel=0.1)


def test_right_and_wrong_answers_that_tie() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        # questions are hard or easy for both, and seeds differ a little
        chance_SI = np.clip(rng.random(60) + rng.normal(0, 0.03, (2, 3, 1)), 0, 1)
        left, right = rng.random((2, 3, 60)) < chance_SI
        found += effect(left.astype(float) - right.astype(float)).found
    assert found <= 17


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seeds decide", "items decide", "both", "five seeds"])
def test_what_is_said_to_be_found_is_found_four_times_in_five(name: str) -> None:
    """What one comparison says is the true effect of the next one."""
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(400):
        told = effect(drawn(TIES[name], rng)).detectable
        assert told is not None
        shares.append(effect(drawn(TIES[name], rng) + told).found)
    assert 0.74 < float(np.mean(shares)) < 0.9


def test_a_difference_among_several_has_to_be_larger() -> None:
    d_SI = drawn(TIES["both"], np.random.default_rng(4))
    alone, among = effect(d_SI), effect(d_SI, family=5)
    assert (alone.low, alone.p) == (among.low, among.p)
    assert alone.detectable is not None
    assert among.detectable is not None
    assert among.detectable > 1.3 * alone.detectable


def test_more_seeds_are_asked_for_where_they_help() -> None:
    rng = np.random.default_rng(3)
    noisy = effect(drawn((3, 50, 1.0, 0.1, 0.1), rng) + 0.8)
    assert not noisy.found
    assert noisy.from_seeds is not None
    assert noisy.from_seeds > 0.9
    assert noisy.seeds_needed is not None
    assert 3 < noisy.seeds_needed < 200
    # where items decide, no number of seeds would do
    few_items = effect(drawn((3, 8, 0.001, 3.0, 0.001), rng) * 1.0 + 0.3)
    assert not few_items.found
    assert few_items.seeds_needed is None


def test_seeds_alone_are_student_s() -> None:
    means = np.array([0.3, 0.5, 0.1])
    found = effect(np.repeat(means[:, None], 4, axis=1))
    error = means.std(ddof=1) / math.sqrt(3)
    assert found.value == pytest.approx(0.3)
    assert found.standard_error == pytest.approx(error, rel=0.1)
    assert found.degrees == 2
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=0.15)
    assert found.effect_size == pytest.approx(0.3 / means.std(ddof=1), rel=0.1)


def test_weights_are_of_items() -> None:
    d_SI = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert effect(d_SI, np.array([2.0, 1.0, 1.0])).value == pytest.approx(0.5)


def test_one_seed_says_nothing_of_others() -> None:
    found = effect(np.ones((1, 30)))
    assert (found.low, found.high, found.p, found.seeds_needed) == (None, None, None, None)
    assert not found.found
    # but that these very models differ on such items is sure
    assert found.p_items is not None
    assert found.p_items < 0.01


def test_equal_to_the_last_bit() -> None:
    found = effect(np.zeros((3, 5)))
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.found
    assert found.p_items == 1
    # the same difference everywhere has no interval, and as many signs as there are items
    same = effect(np.full((3, 5), 0.25))
    assert (same.low, same.high, same.detectable) == (None, None, None)
    assert same.p == same.p_items == 2 / 2**5
    # nor is it more if two levels are alike in themselves
    d_SI = np.zeros((3, 42))
    d_SI[:, 40:] = 1
    apart = effect(d_SI, strata_I=np.array([0] * 40 + [1] * 2))
    assert apart.p is not None
    assert apart.p > 0.05


def test_one_item_says_nothing_of_others() -> None:
    found = effect(np.array([[0.2], [0.3], [0.25]]))
    assert (found.p_items, found.low, found.p) == (None, None, None)
    assert found.value == pytest.approx(0.25)
    assert not found.found


def test_signs_are_flipped_exactly_where_they_are_few() -> None:
    # of 8 ways to sign 1, 2, 3 two are as far from zero as all alike
    assert effect(np.array([[1.0, 2.0, 3.0]])).p_items == pytest.approx(2 / 8)


def test_the_same_numbers_say_the_same() -> None:
    d_SI = drawn(TIES["both"], np.random.default_rng(5))
    assert effect(d_SI) == effect(d_SI.copy())


@pytest.mark.parametrize("wrong", [np.zeros((2, 0)), np.array([[np.nan]]), np.array([[np.inf]])])
def test_what_is_no_difference_is_refused(wrong: Array) -> None:
    with pytest.raises(ValueError, match="finite"):
        effect(wrong)


def test_mcnemar_by_hand() -> None:
    left = np.array([True] * 6 + [False] + [True] * 10)
    right = np.array([False] * 6 + [True] + [True] * 10)
    # 6 of 7 one way: 2 (1 + 7) / 2^7
    assert mcnemar(left, right) == pytest.approx(16 / 128)
    assert mcnemar(left, left) == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize(("degrees", "shift"), [(1.0, 7.77), (2.0, 4.0), (30.0, 2.9), (7.5, 0.0)])
def test_power_is_that_of_the_non_central_distribution(degrees: float, shift: float) -> None:
    bound = stats.t.ppf(0.975, degrees)
    exact = stats.nct.sf(bound, degrees, shift) + stats.nct.cdf(-bound, degrees, shift)
    assert statistics._power(np.array([shift]), 1.0, degrees) == pytest.approx(
        float(exact), abs=2e-3
    )


def test_power_rises_with_the_difference() -> None:
    """Also at degrees and shifts where scipy's own is not a number."""
    for degrees in (1.0011796664517236, 17.290978421666065, 29.82955901230374):
        found = [
            statistics._power(np.array([shift]), 1.0, degrees) for shift in np.linspace(0, 30, 61)
        ]
        assert found == sorted(found)
        assert found[0] == pytest.approx(0.05, abs=2e-3)
