"""The episodic memory: verified answers alone, of this split alone, and nothing that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.evaluate.test_thinking import model_of
from valkyrie_core.data.byte_tokenizer import BytesTokenizer
from valkyrie_core.data.tasks.khop import KHopConfig
from valkyrie_core.data.tasks.task import Example, examples
from valkyrie_core.evaluate import episodic
from valkyrie_core.evaluate.episodic import Episodes, asked_with_memory
from valkyrie_core.nn.canvas import Canvas

TASK = KHopConfig(symbols=4, hops=(1, 2))


class Oracle(Canvas):
    """A canvas that answers right, by looking at the question: what is tested is the memory."""

    wrong = False

    def forward(self, tokens_BC: Tensor, carry: object) -> object:  # type: ignore[override]
        out = super().forward(tokens_BC, carry)  # type: ignore[arg-type]
        tokenizer = BytesTokenizer()
        logits_BCV = torch.zeros_like(out.logits_BCV)
        for row, tokens_C in enumerate(tokens_BC):
            text = tokenizer.decode([t for t in tokens_C.tolist() if t])
            answer = next(a for a in "abcd" if TASK.holds(text, a) != self.wrong)
            for cell, token in enumerate(tokenizer.encode(answer + "\n")):
                logits_BCV[row, cell, token] = 9.0
        return out._replace(logits_BCV=logits_BCV)


def oracle(*, wrong: bool = False) -> Oracle:
    model = model_of("canvas")
    assert isinstance(model, Canvas)
    model.__class__ = Oracle
    assert isinstance(model, Oracle)
    model.wrong = wrong
    return model


def asked(count: int) -> list[Example]:
    return list(examples(TASK, count, seed=0, held_out=False, fraction=0.1))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodic, "BATCH_SIZE", 4)


def test_a_question_that_comes_again_is_recalled() -> None:
    questions = asked(8)
    found = asked_with_memory(
        oracle(), BytesTokenizer(), TASK, [*questions, *questions], threshold=0.999999
    )
    assert all(found.right)
    assert found.hits >= 8
    assert (found.hits, found.refused, found.misses) == (found.hits, 0, 16 - found.hits)
    assert found.stored == found.misses
    # four steps of thought, or one
    assert found.steps == 4 * found.misses + found.hits


def test_what_does_not_hold_is_refused_and_thought_about() -> None:
    """Where everything counts as near, the checker stands between a memory and a wrong answer."""
    found = asked_with_memory(oracle(), BytesTokenizer(), TASK, asked(16), threshold=-1.0)
    assert all(found.right)
    assert found.refused > 0
    assert found.misses == 4
    assert found.hits + found.refused + found.misses == 16


def test_shuffled_keys_save_nothing_and_cost_nothing() -> None:
    questions = asked(8)
    generator = torch.Generator().manual_seed(0)

    def shuffled(keys_BX: Tensor) -> Tensor:
        return torch.randn(keys_BX.shape, generator=generator, dtype=keys_BX.dtype)

    found = asked_with_memory(
        oracle(),
        BytesTokenizer(),
        TASK,
        [*questions, *questions],
        threshold=0.9,
        keys_of=shuffled,
    )
    assert all(found.right)
    assert (found.hits, found.refused) == (0, 0)
    assert found.steps == 4 * 16


def test_wrong_answers_are_never_stored() -> None:
    questions = asked(8)
    found = asked_with_memory(
        oracle(wrong=True), BytesTokenizer(), TASK, [*questions, *questions], threshold=0.5
    )
    assert not any(found.right)
    assert (found.stored, found.hits, found.misses) == (0, 0, 16)


def test_every_split_begins_with_an_empty_memory() -> None:
    model, questions = oracle(), asked(4)
    for _ in range(2):
        found = asked_with_memory(model, BytesTokenizer(), TASK, questions, threshold=0.999)
        # all in one batch: nothing is known of its own mates either
        assert (found.hits, found.stored) == (0, 4)


def test_the_nearest_key_answers() -> None:
    episodes = Episodes(0.9)
    assert episodes.recall(torch.tensor([1.0, 0.0])) is None
    episodes.keep(torch.tensor([2.0, 0.0]), "east")
    episodes.keep(torch.tensor([0.0, 0.5]), "north")
    assert episodes.recall(torch.tensor([3.0, 0.1])) == "east"
    assert episodes.recall(torch.tensor([0.01, 7.0])) == "north"
    assert episodes.recall(torch.tensor([1.0, 1.0])) is None
    assert len(episodes) == 2
