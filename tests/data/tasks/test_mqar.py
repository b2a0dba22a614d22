"""MQAR problems: the answers are right, nothing gives them away, training never meets the test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from valkyrie_core.data.tasks.mqar import FILLER, IGNORED, TEST_FROM, MQARConfig, problems

CONFIG = MQARConfig(vocab_size=40, length=30, pairs=(2, 5, 10))


def answers(tokens_T: np.ndarray, pairs: int) -> dict[int, int]:
    """Brute force: what every later key asks for, by place."""
    known = {int(tokens_T[2 * i]): int(tokens_T[2 * i + 1]) for i in range(pairs)}
    return {
        place: known[int(token)]
        for place, token in enumerate(tokens_T.tolist())
        if place >= 2 * pairs and token != FILLER
    }


@pytest.mark.parametrize("pairs", CONFIG.pairs)
def test_targets_are_the_values_of_the_keys_and_stand_at_the_queries_only(pairs: int) -> None:
    batch = problems(CONFIG, 3, 0, 50, pairs)
    for tokens_T, targets_T in zip(batch.tokens_BT.numpy(), batch.targets_BT.numpy(), strict=True):
        right = answers(tokens_T, pairs)
        scored = {place: int(targets_T[place]) for place in np.flatnonzero(targets_T != IGNORED)}
        assert scored == right
        asked = {int(tokens_T[place]) for place in right}
        # every key is asked for
        assert asked == {int(token) for token in tokens_T[0 : 2 * pairs : 2]}
        assert len(asked) == pairs


def test_keys_values_and_filler_never_mix() -> None:
    tokens_BT = problems(CONFIG, 0, 0, 60, 5).tokens_BT
    K = CONFIG.num_keys
    keys_BP, values_BP = tokens_BT[:, 0:10:2], tokens_BT[:, 1:10:2]
    assert int(keys_BP.min()) >= 1
    assert int(keys_BP.max()) <= K
    assert int(values_BP.min()) > K
    assert int(values_BP.max()) < CONFIG.vocab_size
    rest_BT = tokens_BT[:, 10:]
    # no value stands after the pairs: an answer never helps with a later one
    assert bool((rest_BT <= K).all())


def test_no_place_and_no_key_gives_an_answer_away() -> None:
    batch = problems(CONFIG, 1, 0, 3000, 5)
    scored_BT = batch.targets_BT != IGNORED
    chance = 1 / CONFIG.num_keys
    for place in (12, 20, 29):
        targets = batch.targets_BT[:, place][scored_BT[:, place]]
        most = torch.bincount(targets).max().item() / len(targets)
        assert most < 2.5 * chance
    key = 7
    targets = batch.targets_BT[scored_BT & (batch.tokens_BT == key)]
    assert torch.bincount(targets).max().item() / len(targets) < 4 * chance


def test_a_problem_is_a_function_of_seed_and_index() -> None:
    whole = problems(CONFIG, 5, 10, 8)
    parts = [problems(CONFIG, 5, 10, 3), problems(CONFIG, 5, 13, 5)]
    for one, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(pieces))
    assert not torch.equal(whole.tokens_BT, problems(CONFIG, 6, 10, 8).tokens_BT)


def test_training_and_test_problems_differ() -> None:
    seen = {row.tobytes() for row in problems(CONFIG, 0, 0, 500, 5).tokens_BT.numpy()}
    # another seed's training is none of them either
    for batch in (problems(CONFIG, 0, TEST_FROM, 500, 5), problems(CONFIG, 1, 0, 500, 5)):
        assert not seen & {row.tobytes() for row in batch.tokens_BT.numpy()}


def test_the_numbers_of_pairs_take_turns() -> None:
    tokens_BT = problems(CONFIG, 0, 0, 6).tokens_BT
    K = CONFIG.num_keys
    assert (tokens_BT > K).sum(1).tolist() == [2, 5, 10, 2, 5, 10]


def test_a_target_depends_on_nothing_after_it() -> None:
    """The answer at a place follows from the tokens up to it: a causal model can know it."""
    batch = problems(CONFIG, 2, 0, 20, 5)
    for tokens_T, targets_T in zip(batch.tokens_BT.numpy(), batch.targets_BT.numpy(), strict=True):
        for place in np.flatnonzero(targets_T != IGNORED):
            assert answers(tokens_T[: place + 1], 5)[int(place)] == targets_T[place]


@pytest.mark.parametrize(
    "wrong", [{"pairs": (11,)}, {"pairs": (0,)}, {"vocab_size": 8, "pairs": (4,)}]
)
def test_what_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MQARConfig.model_validate({"vocab_size": 40, "length": 30, **wrong})
