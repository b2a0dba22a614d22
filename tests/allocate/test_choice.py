"""Halving and choosing, with made-up scores."""

from __future__ import annotations

import math

import pytest

from valkyrie_core.allocate.choice import Scored, better_half, choose, pareto_marks, pareto_ranks
from valkyrie_core.allocate.statistics import difference, mean_of, seeds_needed

GUESSING = 0.1


def scored(
    name: str,
    bpb: tuple[float, ...],
    recall: tuple[float, ...],
    decode_bytes: int = 10,
    *,
    is_baseline: bool = False,
    flops: int = 10,
) -> Scored:
    return Scored(name, is_baseline, bpb, recall, decode_bytes, flops)


def test_intervals_are_students() -> None:
    mean = mean_of([1.0, 2.0, 3.0])
    assert mean.value == 2.0
    assert mean.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert mean_of([5.0]).half_width is None
    assert difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]).half_width == 0
    # a thousandth beside a spread of 0.01 takes hundreds of seeds; zero takes more than any
    many = seeds_needed([0.001, 0.011, -0.009])
    assert many is not None
    assert many > 300
    assert seeds_needed([1.0, -1.0]) is None


def test_pareto_ranks() -> None:
    assert pareto_ranks([(0, 0), (1, 1), (0, 2), (2, 2)]) == [0, 1, 1, 2]
    # equal points do not dominate each other
    assert pareto_ranks([(1, 1), (1, 1)]) == [0, 0]
    assert pareto_ranks([]) == []


def test_the_better_half_goes_on_and_baselines_always() -> None:
    field = [
        scored("RRRR", (9.0,), (0.0,), 99, is_baseline=True, flops=99),
        scored("good", (1.0,), (0.9,)),
        scored("best", (0.9,), (1.0,)),
        scored("bad", (2.0,), (0.1,), 20),
        scored("AAAA", (8.0,), (0.0,), 98, is_baseline=True, flops=98),
        scored("worse", (3.0,), (0.05,), 30),
    ]
    assert better_half(field) == ["RRRR", "good", "best", "bad", "AAAA"]
    assert better_half(field[1:4]) == ["good", "best"]


def test_marks_are_the_front() -> None:
    field = [scored("a", (1.0,), (0.5,)), scored("b", (1.0,), (0.4,)), scored("c", (0.9,), (0.1,))]
    assert pareto_marks(field) == {"a": True, "b": False, "c": True}


def test_most_recall_within_noise_of_the_best_loss_then_fewest_bytes() -> None:
    choice = choose(
        [
            scored("RRRR", (2.00, 2.01, 2.02), (0.2, 0.2, 0.2), 1, is_baseline=True),
            scored("RRRA", (2.01, 2.00, 2.02), (0.99, 0.99, 1.0), 4),
            scored("RARA", (2.02, 2.01, 2.00), (1.0, 1.0, 1.0), 8),
            scored("AAAA", (2.50, 2.51, 2.52), (1.0, 1.0, 1.0), 2, is_baseline=True),
        ],
        GUESSING,
    )
    # AAAA is surely worse in loss; RARA ties in recall and reads more
    assert choice.name == "RRRA"
    assert "surely recalls more than RRRR" in choice.reason


def test_noise_is_not_a_choice() -> None:
    choice = choose(
        [
            scored("RRRR", (2.0, 2.0, 2.0), (0.2, 0.9, 0.5), 1, is_baseline=True),
            scored("RRRA", (2.0, 2.01, 2.0), (0.9, 0.8, 0.9), 4),
        ],
        GUESSING,
    )
    assert choice.name is None
    assert "not enough evidence" in choice.reason
    assert choice.seeds_needed is not None
    assert choice.seeds_needed > 3


def test_one_seed_is_not_enough_and_says_what_would_be() -> None:
    choice = choose([scored("a", (1.0,), (1.0,)), scored("b", (2.0,), (0.1,))], GUESSING)
    assert (choice.name, choice.seeds_needed) == (None, 3)


def test_a_field_that_recalls_nothing_shows_nothing() -> None:
    field = [scored("a", (1.0, 1.1), (0.15, 0.15)), scored("b", (1.0, 1.1), (0.12, 0.13), 1)]
    choice = choose(field, GUESSING)
    assert choice.name is None
    assert "--recall-steps" in choice.reason


def test_what_diverged_is_never_chosen() -> None:
    inf = math.inf
    field = [scored("gone", (1.0, inf), (1.0, 1.0)), scored("here", (2.0, 2.1), (0.5, 0.5))]
    assert choose(field, GUESSING).name == "here"
    assert choose(field[:1], GUESSING).name is None
    assert field[0].mean_bpb == (inf, None, 2)
    assert better_half(field) == ["here"]
