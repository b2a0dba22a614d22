"""Facts stand where they should, and who can copy finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.menu import awake, hybrid_config
from valkyrie_core.data.byte_tokenizer import BytesTokenizer
from valkyrie_core.errors import StoppedError
from valkyrie_core.evaluate import recall, recall_cases
from valkyrie_core.infer.engine import Engine, Prefilled
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM

TOKENIZER = BytesTokenizer()
FILLER = TOKENIZER.encode("It was a dull day and nobody had anything to say about it. " * 60)


def cases(lengths: list[int]) -> list[recall_cases.Case]:
    return recall_cases.make_cases(TOKENIZER, FILLER, lengths)


class Copier:
    """Predicts what followed the last 12 tokens when they were seen before; its state is a text."""

    WINDOW = 12

    class Model:
        @staticmethod
        def init_state(batch_size: int) -> tuple[int, ...]:
            return ()

    model = Model()

    def guess(self, text: tuple[int, ...]) -> Tensor:
        logits_V = torch.zeros(TOKENIZER.vocab_size)
        key = text[-self.WINDOW :]
        for start in range(len(text) - self.WINDOW - 1, -1, -1):
            if text[start : start + self.WINDOW] == key:
                logits_V[text[start + self.WINDOW]] = 20.0
                break
        return logits_V

    def prefill(self, tokens_BT: Tensor, state: Any, *, stop: Any = None) -> Prefilled | None:
        if stop is not None and stop():
            return None
        text = (*state, *tokens_BT[0].tolist())
        return Prefilled(self.guess(text)[None], text)  # type: ignore[arg-type]

    def decode_one_token(self, tokens_B: Tensor, state: Any) -> Prefilled:
        known = self.prefill(tokens_B[:, None], state)
        assert known is not None
        return known

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        losses = []
        for token, target in zip(tokens_BT[0].tolist(), targets_BT[0].tolist(), strict=True):
            state = (*state, token)
            losses.append(-self.guess(state).log_softmax(-1)[target])
        return torch.stack(losses)[None], state


def summary(answers: list[recall.Answer]) -> dict[str, recall.Recall]:
    return {x.task: x for x in recall.summarise(answers) if x.depth is None}


def test_who_can_copy_finds_facts_and_no_more() -> None:
    found = summary(recall.measure_recall(Copier(), TOKENIZER, cases([1500])))  # type: ignore[arg-type]
    for task in ("passkey", "needles", "mqar"):
        assert (found[task].first, found[task].mean_rank, found[task].written) == (1, 0, 1), task
    # one hop is not enough
    assert found["variables"].written == 0
    assert found["passkey"].questions == 10
    assert found["mqar"].questions == 8


def test_who_knows_nothing_finds_nothing() -> None:
    class Blank(Copier):
        def guess(self, text: tuple[int, ...]) -> Tensor:
            return torch.zeros(TOKENIZER.vocab_size)

    for score in summary(
        recall.measure_recall(Blank(), TOKENIZER, cases([900]))  # type: ignore[arg-type]
    ).values():
        assert (score.first, score.written) == (0, 0)
        assert score.mean_rank == recall_cases.CANDIDATES - 1
        assert score.chance == 1 / 16


def test_one_word_is_the_baseline_of_all_lengths() -> None:
    answers = [
        recall.Answer("mqar", length, 0.0, rank, False, place)
        for length, rank, place in [(256, 0, 5), (256, 3, 5), (512, 1, 5), (512, 0, 8), (512, 0, 9)]
    ]
    short, long = (x for x in recall.summarise(answers) if x.depth is None)
    assert (short.first, short.mean_rank, short.constant) == (0.5, 1.5, 1.0)
    assert (long.first, long.constant) == (2 / 3, 1 / 3)


@pytest.mark.parametrize("task", recall_cases.TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_text_has_its_length_its_facts_and_a_seed(task: recall_cases.Task, depth: float) -> None:
    case = recall_cases.make_case(task, 1024, depth, FILLER, TOKENIZER, "1")
    assert len(case.tokens) == 1024
    assert case == recall_cases.make_case(task, 1024, depth, FILLER, TOKENIZER, "1")
    assert case != recall_cases.make_case(task, 1024, depth, FILLER, TOKENIZER, "2")
    text = TOKENIZER.decode(case.tokens[1:])
    for question in case.questions:
        assert len(question.candidates) == len(set(question.candidates)) == 16
        assert question.answer in question.candidates
        if task != "variables":
            fact = "".join(question.pieces) + f" {question.answer}."
            assert text.count(fact) == 1
    if task == "passkey":
        place = text.index("The word of") / (len(text) - len(fact))
        assert place == pytest.approx(depth, abs=0.01)


def test_a_length_that_holds_no_facts_is_told() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        recall_cases.make_case("mqar", 100, 0, FILLER, TOKENIZER, "1")
    with pytest.raises(ValueError, match="can't fill"):
        recall_cases.make_case("passkey", 4000, 0, FILLER[:500], TOKENIZER, "1")


def test_a_model_answers_the_same_from_a_fork_and_from_the_whole_text() -> None:
    config = hybrid_config().model_dump()
    config["vocab_size"] = TOKENIZER.vocab_size
    model: HybridLM = awake(ModelConfig.model_validate(config)).float().eval()
    engine = Engine(model)
    case = recall_cases.make_case("needles", 600, 0, FILLER, TOKENIZER, "0")
    known = engine.prefill(torch.tensor([case.tokens]), model.init_state(1))
    assert known is not None
    shared = [recall.ask(engine, TOKENIZER, known, question) for question in case.questions]
    for question, found in zip(case.questions, shared, strict=True):
        fresh = engine.prefill(torch.tensor([case.tokens]), model.init_state(1))
        assert fresh is not None
        assert recall.ask(engine, TOKENIZER, fresh, question) == found


def test_a_stop_is_heard() -> None:
    with pytest.raises(StoppedError):
        recall.measure_recall(
            Copier(),  # type: ignore[arg-type]
            TOKENIZER,
            cases([900]),
            stop=lambda: True,
        )


def test_cases_are_kept_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cases([300, 900])
    # the sixteen pairs of mqar alone are longer than 300 bytes
    assert {(case.task, case.length) for case in made} >= {("passkey", 300), ("mqar", 900)}
    assert ("mqar", 300) not in {(case.task, case.length) for case in made}

    def ask() -> list[recall_cases.Case]:
        return recall_cases.cached_cases(tmp_path, TOKENIZER, FILLER, [300, 900])

    assert ask() == made
    with monkeypatch.context() as patch:
        patch.delattr(recall_cases, "make_cases")
        assert ask() == made
    (file,) = tmp_path.rglob("cases.json")
    file.write_text(file.read_text().replace("apple", "bread"))
    assert ask() == made
    other = recall_cases.cached_cases(tmp_path, TOKENIZER, FILLER, [300, 900], seed=1)
    assert other != made
