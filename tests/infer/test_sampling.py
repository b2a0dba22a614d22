from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import DivergedError
from valkyrie_core.infer.sampling import (
    SamplingConfig,
    _draw,
    _likeliest,
    allowed_tokens,
    draw_from_prefix,
    make_generator,
    penalize,
    sample,
)

PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])


def draws(
    probs_V: Tensor, sampling: SamplingConfig, count: int = 4000, **more: object
) -> Counter[int]:
    """How often each token is drawn."""
    generator = make_generator(sampling.seed)
    rows = probs_V.log().expand(count, -1)
    return Counter(sample(rows, sampling, [generator] * count, **more).tolist())  # type: ignore[arg-type]


def plain(**changes: object) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **changes})  # type: ignore[arg-type]


def test_frequencies_are_the_probabilities() -> None:
    counts = draws(PROBS, plain())
    for token, prob in enumerate(PROBS.tolist()):
        # four standard deviations of a binomial
        assert abs(counts[token] / 4000 - prob) < 4 * (prob * (1 - prob) / 4000) ** 0.5


def test_temperature_sharpens_and_flattens() -> None:
    squared = PROBS**2 / (PROBS**2).sum()
    assert abs(draws(PROBS, plain(temperature=0.5))[0] / 4000 - squared[0]) < 0.04
    assert abs(draws(PROBS, plain(temperature=10))[3] / 4000 - 0.25) < 0.05


def test_zero_temperature_takes_the_likeliest_without_randomness() -> None:
    generator = make_generator(0)
    before = generator.get_state()
    assert sample(PROBS.log()[None], plain(temperature=0), [generator]).tolist() == [0]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e-3])
def test_tiny_temperatures_do_not_overflow(temperature: float) -> None:
    assert set(draws(PROBS, plain(temperature=temperature), count=50)) == {0}


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, 1), (0.41, 2), (0.71, 3), (0.95, 4), (1, 4)])
def test_top_p_keeps_the_smallest_set(top_p: float, kept: int) -> None:
    assert set(draws(PROBS, plain(top_p=top_p))) == set(range(kept))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 99])
def test_top_k(top_k: int) -> None:
    assert set(draws(PROBS, plain(top_k=top_k))) == set(range(min(top_k, 4)))


def test_top_k_of_equal_logits_takes_the_lowest_ids() -> None:
    assert set(draws(torch.full((5000,), 1 / 5000), plain(top_k=2), count=50)) == {0, 1}


def test_top_p_counts_what_top_k_left() -> None:
    # of the first two, the first holds 4/7 = 0.571
    assert set(draws(PROBS, plain(top_k=2, top_p=0.56))) == {0}
    assert set(draws(PROBS, plain(top_k=2, top_p=0.58))) == {0, 1}


def test_penalty_follows_the_sign_and_spares_markers() -> None:
    logits = torch.tensor([2.0, 2, 2, 2, 2, 2, -2, 2], dtype=torch.float64)
    changed = penalize(logits, [4, 5, 6, 6], 2.0)
    assert changed.tolist() == [2, 2, 2, 2, 2, 1, -4, 2]
    assert logits.tolist() == [2, 2, 2, 2, 2, 2, -2, 2]


def test_penalty_looks_back_one_window() -> None:
    logits = torch.zeros(1, NUM_RESERVED + 3)
    logits[0, NUM_RESERVED:] = torch.tensor([3.0, 2.0, 1.0])
    first, second = NUM_RESERVED, NUM_RESERVED + 1
    greedy = SamplingConfig(temperature=0, repetition_penalty=10, repetition_window=2)
    generator = [make_generator(0)]
    recent = [[second, first, second]]
    assert sample(logits, greedy, generator, histories=recent).item() == NUM_RESERVED + 2
    forgotten = [[first, second, second]]
    assert sample(logits, greedy, generator, histories=forgotten).item() == first


def test_only_allowed_tokens_are_drawn() -> None:
    allowed_V = allowed_tokens(8, [4])
    assert allowed_V.nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert set(draws(torch.full((8,), 1 / 8), plain(), allowed_V=allowed_V)) == {4, 5, 6, 7}
    assert set(draws(torch.full((8,), 1 / 8), plain(top_k=99), allowed_V=allowed_V)) == {4, 5, 6, 7}
    with pytest.raises(ValueError, match="outside the vocabulary"):
        allowed_tokens(8, [8])


def test_a_seed_fixes_the_draws_and_streams_differ() -> None:
    logits = torch.zeros(1, 1000)

    def row(seed: int, *stream: int) -> list[int]:
        generator = make_generator(seed, *stream)
        return [int(sample(logits, plain(), [generator])) for _ in range(5)]

    assert row(3) == row(3)
    assert len({tuple(row(*key)) for key in [(3,), (4,), (3, 0), (3, 1), (4, 0)]}) == 5


def test_the_global_generator_is_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws(PROBS, plain(), count=3)
    assert torch.equal(torch.get_rng_state(), before)


@given(
    logits=st.lists(st.lists(st.floats(-1e4, 1e4), min_size=7, max_size=7), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 10.0]),
    top_p=st.sampled_from([1e-9, 0.3, 0.95, 1.0]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    penalty=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=150, deadline=None)
def test_batch_mates_change_nothing(
    logits: list[list[float]],
    temperature: float,
    top_p: float,
    top_k: int | None,
    penalty: float,
    seed: int,
) -> None:
    sampling = SamplingConfig(
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=penalty, seed=seed
    )
    rows = torch.tensor(logits, dtype=torch.float64)
    count = len(logits)
    allowed_V = allowed_tokens(7, [2])
    histories = [[5, 5, row % 7] for row in range(count)]
    together = sample(
        rows,
        sampling,
        [make_generator(seed, row) for row in range(count)],
        allowed_V=allowed_V,
        histories=histories,
    )
    alone = [
        int(
            sample(
                rows[row : row + 1],
                sampling,
                [make_generator(seed, row)],
                allowed_V=allowed_V,
                histories=histories[row : row + 1],
            )
        )
        for row in range(count)
    ]
    assert together.tolist() == alone
    assert set(alone) <= {2, 5, 6}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits_are_reported(bad: float) -> None:
    logits = torch.zeros(1, 8)
    logits[0, 6] = bad
    with pytest.raises(DivergedError, match="not finite"):
        sample(logits, plain(), [make_generator(0)])


def test_a_broken_logit_of_a_forbidden_token_does_not_matter() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 0] = float("nan")
    drawn = sample(logits, plain(), [make_generator(0)], allowed_V=allowed_tokens(8, []))
    assert drawn.item() >= NUM_RESERVED


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"topk": 3},
    ],
)
def test_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**wrong)  # type: ignore[arg-type]


def test_a_row_needs_a_generator() -> None:
    with pytest.raises(ValueError, match="generators"):
        sample(torch.zeros(2, 8), plain(), [make_generator(0)])


@pytest.mark.parametrize("vocab_size", [300, 5000])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0, 8.0])
def test_the_likeliest_candidates_settle_the_same_draw(
    vocab_size: int, top_k: int | None, top_p: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    settled = 0
    for index in range(40):
        logits = torch.randn(1, vocab_size, generator=generator, dtype=torch.float64) * spread
        if index % 2:
            # many equal ones
            logits = (logits * 4).round() / 4
        sampling = SamplingConfig(temperature=0.8, top_p=top_p, top_k=top_k)
        uniform_11 = torch.rand(1, 1, generator=generator, dtype=torch.float64)
        quick = draw_from_prefix(logits[0], sampling, float(uniform_11), 64)
        slow = _draw(*_likeliest(logits, sampling), 0.8, top_p, uniform_11)
        assert quick in (None, int(slow))
        settled += quick is not None
    if spread == 8:
        assert settled > 30


def test_a_draw_on_the_edge_is_left_to_the_slow_way() -> None:
    logits_V = torch.full((5000,), -100.0, dtype=torch.float64)
    logits_V[:2] = 0.0
    sampling = plain()
    assert draw_from_prefix(logits_V, sampling, 0.4999, 64) == 0
    assert draw_from_prefix(logits_V, sampling, 0.5001, 64) == 1
    assert draw_from_prefix(logits_V, sampling, 0.5, 64) is None
    assert draw_from_prefix(logits_V, plain(top_p=0.5), 0.3, 64) is None
