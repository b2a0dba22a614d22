"""Every measure by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from valkyrie_core.experts import measures
from valkyrie_core.experts.measures import Lift


def choices(*rows: tuple[int, ...]) -> measures.Choices:
    return np.array(rows, dtype=np.int16)


def test_an_even_load() -> None:
    load_E = np.array([7, 7, 7, 7])
    assert measures.over_ideal(load_E) == pytest.approx([1, 1, 1, 1])
    assert measures.max_vio(load_E) == 0
    assert measures.variation(load_E) == 0
    assert measures.entropy(load_E) == pytest.approx(math.log(4))
    assert measures.effective_experts(load_E) == pytest.approx(4)
    # too few to tell
    assert measures.dead(load_E) is None
    assert measures.dead(10 * load_E) == []


def test_one_expert_for_all() -> None:
    load_E = np.array([0, 0, 12, 0, 0])
    assert measures.max_vio(load_E) == pytest.approx(5 - 1)
    # mean 2.4, squared deviations 4 x 2.4^2 + 9.6^2 = 115.2
    assert measures.variation(load_E) == pytest.approx(math.sqrt(115.2 / 5) / 2.4)
    assert measures.entropy(load_E) == 0
    assert measures.effective_experts(load_E) == 1
    assert measures.dead(100 * load_E) == [0, 1, 3, 4]


def test_a_load_between() -> None:
    load_E = np.array([2, 1, 1])
    assert measures.over_ideal(load_E) == pytest.approx([1.5, 0.75, 0.75])
    assert measures.max_vio(load_E) == pytest.approx(0.5)
    # H = 1/2 ln 2 + 1/2 ln 4 = 1.5 ln 2
    assert measures.effective_experts(load_E) == pytest.approx(2**1.5)
    # a tenth of a fair share is not less than a tenth
    assert measures.dead(np.array([10, 100, 190, 100])) == []
    assert measures.dead(np.array([9, 101, 190, 100])) == [0]


def test_no_load_is_no_number() -> None:
    load_E = np.zeros(3, dtype=np.int64)
    assert measures.over_ideal(load_E) is None
    assert measures.max_vio(load_E) is None
    assert measures.variation(load_E) is None
    assert measures.entropy(load_E) is None
    assert measures.effective_experts(load_E) is None
    assert measures.dead(load_E) is None
    assert measures.mean_max_vio(np.zeros((2, 3))) is None


def test_max_vio_of_batches_is_their_mean() -> None:
    # 1.0 and 0.0; balanced over both it is less than in each
    assert measures.mean_max_vio(np.array([[4, 0], [2, 2]])) == pytest.approx(0.5)
    assert measures.mean_max_vio(np.array([[4, 0], [0, 4], [0, 0]])) == pytest.approx(1)
    assert measures.max_vio(np.array([4, 4])) == 0


def test_loads_leave_out_what_is_not_used() -> None:
    assert measures.loads(choices((0, 2), (2, -1), (1, -1)), 4).tolist() == [1, 1, 2, 0]


def test_information_of_a_perfect_specialist() -> None:
    counts_GE = np.array([[10, 0, 0], [0, 20, 0], [0, 0, 30]])
    assert measures.mutual_information(counts_GE) == pytest.approx(1)
    # two experts for one domain tell it as well
    assert measures.mutual_information(np.array([[5, 5, 0], [0, 0, 7]])) == pytest.approx(1)


def test_information_of_who_does_not_care() -> None:
    assert measures.mutual_information(np.array([[1, 2, 3], [2, 4, 6]])) == pytest.approx(0)


def test_information_by_hand() -> None:
    # p = 3/8, 1/8, 1/8, 3/8; all margins one half
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = measures.mutual_information(np.array([[3, 1], [1, 3]]))
    assert found == pytest.approx(expected / math.log(2))


def test_one_domain_has_no_information() -> None:
    assert measures.mutual_information(np.array([[3, 1]])) is None
    assert measures.mutual_information(np.array([[3, 1], [0, 0]])) is None


def test_the_null_of_a_perfect_specialist_is_small() -> None:
    domain_W = np.repeat([0, 1], 20)
    counts_WE = np.where(domain_W[:, None] == [0, 1], 50, 0)
    value = measures.mutual_information(measures.by_domain(counts_WE, domain_W, 2))
    null = measures.shuffled_information(counts_WE, domain_W, shuffles=200, seed=3)
    assert value == pytest.approx(1)
    assert null is not None
    assert null.mean < 0.05
    assert null.mean < null.high < 0.15
    assert null == measures.shuffled_information(counts_WE, domain_W, shuffles=200, seed=3)
    assert null != measures.shuffled_information(counts_WE, domain_W, shuffles=200, seed=4)


def test_the_null_holds_where_windows_differ_and_domains_do_not() -> None:
    """Windows of one kind each: tokens alone would call it significant, windows don't."""
    generator = np.random.default_rng(0)
    above = 0
    for _ in range(100):
        kind_W = generator.integers(2, size=24)
        counts_WE = np.where(kind_W[:, None] == [0, 1], 40, 10)
        domain_W = np.repeat([0, 1], 12)
        value = measures.mutual_information(measures.by_domain(counts_WE, domain_W, 2))
        null = measures.shuffled_information(counts_WE, domain_W, shuffles=100, seed=1)
        assert null is not None
        assert value is not None
        above += value > null.high
    assert above <= 12


def test_too_few_windows_have_no_null() -> None:
    # 3 and 3: 20 ways; 4 and 4: 70
    for per_domain, known in ((3, False), (4, True)):
        domain_W = np.repeat([0, 1], per_domain)
        counts_WE = np.ones((2 * per_domain, 2), dtype=np.int64)
        null = measures.shuffled_information(counts_WE, domain_W, shuffles=10, seed=0)
        assert (null is not None) == known


def test_pairs_are_all_pairs() -> None:
    # three slots: 0-1, 0-2 and 1-2, not neighbours in rank alone
    pairs_EE = measures.pair_counts(choices((0, 1, 2), (2, 0, -1), (3, -1, -1)), 4)
    assert pairs_EE.tolist() == [[2, 1, 2, 0], [1, 1, 1, 0], [2, 1, 2, 0], [0, 0, 0, 1]]


def test_co_activation_by_hand() -> None:
    # loads 2, 2, 2, 2; products 4 for each of 6 pairs; 4 pairs seen: chance is 4 / 6 a pair
    found = measures.co_activation([choices((0, 1), (1, 0), (2, 3), (2, 3))], 4)
    assert found is not None
    assert found[0] == [None, pytest.approx(3), 0, 0]
    assert found[3] == [0, 0, pytest.approx(3), None]


def test_co_activation_of_every_pair_once_is_one() -> None:
    all_pairs = choices(*((i, j) for i in range(5) for j in range(i)))
    found = measures.co_activation([all_pairs], 5)
    assert found is not None
    for i, row in enumerate(found):
        assert row[i] is None
        assert [value for j, value in enumerate(row) if j != i] == pytest.approx([1] * 4)


def test_co_activation_counts_within_a_round() -> None:
    rounds = [choices((0, 1), (0, 1)), choices((2, 3), (2, 3))]
    found = measures.co_activation(rounds, 4)
    assert found is not None
    assert found[0][1] == pytest.approx(1)
    assert found[2][3] == pytest.approx(1)
    # never in one round, so chance has nothing to say
    assert found[0][2] is None


def test_no_pairs_no_co_activation() -> None:
    assert measures.co_activation([choices((0,), (1,))], 2) is None


@pytest.mark.parametrize("weights", [(0.7, 0.1, 0.1, 0.1), (0.45, 0.45, 0.05, 0.05)])
def test_a_random_router_with_uneven_loads_is_chance(weights: tuple[float, ...]) -> None:
    """Where symmetry makes loads decide everything, pairs are what loads say, to the noise."""
    rng = np.random.default_rng(0)
    # the two best of logits with Gumbel noise: drawn by weight, without replacement
    noisy_RE = np.log(weights) + rng.gumbel(size=(200_000, 4))
    experts_RK = np.argsort(-noisy_RE, axis=1)[:, :2].astype(np.int16)
    found = measures.co_activation([experts_RK], 4)
    assert found is not None
    apart = [value for i, row in enumerate(found) for j, value in enumerate(row) if i != j]
    if weights[0] == 0.7:
        assert apart == pytest.approx([1] * 12, abs=0.03)
    else:
        # of two kinds of experts loads alone don't tell all: near, not equal
        assert apart == pytest.approx([1] * 12, abs=0.35)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_chance_has_the_loads_it_was_fitted_to(slots: int) -> None:
    load_E = np.array([90, 40, 0, 60, 10, 50, 50])
    # some tokens meet fewer
    tokens_K = np.zeros(slots + 1, dtype=np.int64)
    tokens_K[slots] = (load_E.sum() - 30) // slots
    tokens_K[1] = load_E.sum() - slots * tokens_K[slots]
    chance_EE = measures.chance_pairs(load_E, tokens_K)
    assert chance_EE == pytest.approx(chance_EE.T)
    assert not chance_EE[2].any()
    # every token of k experts is k (k - 1) ordered pairs
    assert chance_EE.sum() == pytest.approx(slots * (slots - 1) * tokens_K[slots])


def test_chance_by_counting_all_sets() -> None:
    weights, tokens = np.array([3.0, 2.0, 1.0, 0.5]), 1000
    sets = list(itertools.combinations(range(4), 3))
    worth = np.array([weights[list(one)].prod() for one in sets])
    share = worth / worth.sum()
    load_E = np.array([share[[e in one for one in sets]].sum() for e in range(4)]) * tokens
    expected_EE = np.zeros((4, 4))
    for one, part in zip(sets, share, strict=True):
        for i, j in itertools.permutations(one, 2):
            expected_EE[i, j] += part * tokens
    found_EE = measures.chance_pairs(load_E, np.array([0, 0, 0, tokens]))
    assert found_EE == pytest.approx(expected_EE, rel=1e-3)


def test_top_tokens_by_hand() -> None:
    tokens_R = np.array([7, 7, 7, 9, 9, 9, 9, 5])
    experts_RK = choices((0,), (0,), (1,), (1,), (1,), (1,), (0,), (0,))
    found = measures.top_tokens(tokens_R, experts_RK, 3, count=2, least=1)
    # expert 0 has half of all tokens: the one 5 (lift 2), two of three 7, a quarter of the 9
    assert found[0] == [Lift(5, 1, 2.0), Lift(7, 2, pytest.approx(4 / 3))]  # type: ignore[arg-type]
    assert found[1] == [Lift(9, 3, 1.5), Lift(7, 1, pytest.approx(2 / 3))]  # type: ignore[arg-type]
    assert found[2] == []
    often = measures.top_tokens(tokens_R, experts_RK, 3, count=2, least=2)
    assert [one.token for one in often[0]] == [7]


def test_agreement_by_hand() -> None:
    now = choices((0, 1), (2, -1), (3, 0))
    before = choices((1, 0), (1, 2), (1, 0))
    # both; its only one; one of two
    assert measures.agreement(now, before) == pytest.approx((1 + 1 + 0.5) / 3)
    # slots that are not used are no agreement
    assert measures.agreement(choices((2, -1)), choices((1, -1))) == 0
    assert measures.agreement(now, now) == 1
    assert measures.agreement(now[:0], before[:0]) is None


def test_gini_by_hand() -> None:
    assert measures.gini([1, 1, 1]) == pytest.approx(0)
    assert measures.gini([0, 0, 5]) == pytest.approx(1)
    # mean difference of all pairs 2/3, mean 1: G = (4/9) / 2, times 3 / 2
    assert measures.gini([0.5, 1.0, 1.5]) == pytest.approx(1 / 3)
    assert measures.gini([-4, 0, 5]) == pytest.approx(1)
    assert measures.gini([0, 0]) is None
    assert measures.gini([-1, -2]) is None


def test_intervals() -> None:
    tokens_W = np.array([10] * 8)
    change_EW = np.stack([np.full(8, 5.0), np.arange(8.0), np.zeros(8)])
    found = measures.intervals(change_EW, tokens_W, seed=0)
    assert found is not None
    # who changes all windows alike has no spread, and who changes none is exactly 0
    assert found[0] == pytest.approx((0.5, 0.5))
    assert found[2] == (0, 0)
    # standard error of the mean of 0 to 7: sqrt(5.25 / 8) = 0.81
    assert found[1] == pytest.approx((0.35 - 0.159, 0.35 + 0.159), abs=0.02)
    assert measures.intervals(change_EW[:, :4], tokens_W[:4], seed=0) is None
    # windows in which nothing is scored are none
    few_W = np.array([10, 10, 10, 10, 0, 0, 0, 0])
    assert measures.intervals(change_EW, few_W, seed=0) is None
    # a mean per token: windows count by their tokens
    uneven = measures.intervals(np.array([[1.0, 2, 3, 4, 5]]), np.array([1, 2, 3, 4, 5]), seed=0)
    assert uneven == [pytest.approx((1, 1))]


@given(
    st.integers(2, 6).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(0, 50), min_size=experts, max_size=experts), min_size=1, max_size=5
        )
    )
)
def test_every_measure_stays_in_its_range(counts: list[list[int]]) -> None:
    counts_GE = np.array(counts)
    load_E = counts_GE.sum(0)
    E = len(load_E)
    if load_E.sum():
        effective, vio = measures.effective_experts(load_E), measures.max_vio(load_E)
        assert effective is not None
        assert vio is not None
        assert 1 - 1e-9 <= effective <= E + 1e-9
        assert 0 <= vio <= E - 1 + 1e-9
    found = measures.mutual_information(counts_GE)
    assert found is None or 0 <= found <= 1 + 1e-9
    unequal = measures.gini(load_E.tolist())
    assert unequal is None or 0 <= unequal <= 1 + 1e-9


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(1, 4))
def test_pairs_over_chance_are_one_on_average(seed: int, experts: int, slots: int) -> None:
    """Weighted by chance, whatever the loads are."""
    slots = min(slots, experts)
    generator = np.random.default_rng(seed)
    keys_RE = generator.random((40, experts)) * generator.random(experts)
    experts_RK = keys_RE.argsort(1)[:, :slots].astype(np.int16)
    pairs_EE = measures.pair_counts(experts_RK, experts)
    assert (pairs_EE == pairs_EE.T).all()
    assert pairs_EE.sum() == 40 * slots**2
    found = measures.co_activation([experts_RK], experts)
    if found is None:
        assert slots == 1
        return
    chance_EE = measures.chance_pairs(pairs_EE.diagonal(), np.bincount([slots] * 40))
    over_EE = np.array([[0.0 if x is None else x for x in row] for row in found])
    apart = ~np.eye(experts, dtype=bool)
    mean = (over_EE * chance_EE)[apart].sum() / chance_EE[apart].sum()
    assert mean == pytest.approx(1)


def test_experts_of_a_token() -> None:
    assert measures.experts_per_token(choices((0, 1), (2, -1), (3, 0), (1, -1))) == 1.5
