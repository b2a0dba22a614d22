"""Questions by number, for a canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from valkyrie_core.data.dataset import DataConfig, Dataset, prepare
from valkyrie_core.data.questions import QuestionStream, check_room
from valkyrie_core.data.tokenizer import EMPTY
from valkyrie_core.errors import RecipeError


def data(folder: Path, **corpora: Any) -> Dataset:
    tree = {"corpora": corpora, "tokenizer": {"type": "bytes"}}
    return prepare(DataConfig.model_validate(tree), cache=folder / "cache")


def khop(count: int, **task: Any) -> dict[str, Any]:
    return {
        "type": "questions",
        "task": {"type": "khop", "symbols": 4, "hops": [1, 2], **task},
        "examples": count,
        "validation_examples": 5,
        "holdout": {"type": "questions", "fraction": 0.5},
    }


def stream(dataset: Dataset, seed: int = 0, cells: int = 20) -> QuestionStream:
    return QuestionStream(dataset, weights=dataset.weights, seed=seed, cells=cells)


def test_an_epoch_asks_every_question_once(tmp_path: Path) -> None:
    dataset = data(tmp_path, khop=khop(12))
    rows = [stream(dataset).row(number) for number in range(24)]

    def text(row: Any) -> tuple[str, str]:
        question = dataset.tokenizer.decode([t for t in row.tokens_C.tolist() if t])
        answer = dataset.tokenizer.decode([t for t in row.targets_C.tolist() if t >= 0])
        return question, answer

    split = dataset.corpora["khop"].train
    asked = sorted(b.decode() for b in split.texts(dataset.tokenizer))
    for epoch in (rows[:12], rows[12:]):
        assert sorted("".join(text(row)) for row in epoch) == asked
    assert [text(row) for row in rows[:12]] != [text(row) for row in rows[12:]]
    for row in rows:
        question, answer = text(row)
        assert question.endswith("=")
        assert len(answer) == 2
        assert answer[1] == "\n"


def test_a_question_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    dataset = data(tmp_path, khop=khop(12))
    first, again = stream(dataset), stream(dataset)
    numbers = list(range(30))
    rows = [first.row(number) for number in numbers]
    other = {number: again.row(number) for number in reversed(numbers)}
    assert all(rows[n].tokens_C.equal(other[n].tokens_C) for n in numbers)
    seeded = stream(dataset, seed=1)
    assert any(not rows[n].tokens_C.equal(seeded.row(n).tokens_C) for n in numbers)


def test_corpora_take_turns_by_their_weights(tmp_path: Path) -> None:
    sudoku = {
        "type": "questions",
        "task": {"type": "sudoku", "size": 4, "blanks": [2]},
        "examples": 10,
        "validation_examples": 2,
        "weight": 3,
    }
    dataset = data(tmp_path, khop=khop(12), sudoku=sudoku)
    both = stream(dataset, cells=22)
    long = sum(int((both.row(n).tokens_C > 0).sum()) == 22 for n in range(840))
    assert long == 630


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [({}, 10, "has 16 tokens, and the canvas 10 cells"), ({"asked": 2}, 30, "is not one question")],
)
def test_what_has_no_room_is_told(
    tmp_path: Path, task: dict[str, Any], cells: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        stream(data(tmp_path, khop=khop(4, **task)), cells=cells)


def test_the_longest_of_all_is_told(tmp_path: Path) -> None:
    nested = khop(60) | {"task": {"type": "expression", "depths": [1, 2, 3, 4]}}
    only = data(tmp_path, nested=nested).corpora["nested"].train
    with pytest.raises(RecipeError) as caught:
        check_room("nested", only, 8)
    assert caught.value.hint is not None
    cells = int(caught.value.hint.split()[3])
    check_room("nested", only, cells)
    with pytest.raises(RecipeError):
        check_room("nested", only, cells - 1)


def test_memory_stands_before_every_document_and_is_never_scored(tmp_path: Path) -> None:
    plain = data(tmp_path, khop=khop(12)).corpora["khop"].train
    tree = {"corpora": {"khop": khop(12)}, "tokenizer": {"type": "bytes"}, "memory_tokens": 3}
    dataset = prepare(DataConfig.model_validate(tree), cache=tmp_path / "cache")
    with_memory = dataset.corpora["khop"].train
    assert with_memory.scored is not None
    assert plain.scored is not None
    for index in range(plain.num_documents):
        own = with_memory.document_tokens(index).tolist()
        assert own == [EMPTY] * 3 + plain.document_tokens(index).tolist()
        start = with_memory.doc_starts[index]
        assert not with_memory.scored[start + 1 : start + 4].any()
    assert int(with_memory.scored.sum()) == int(plain.scored.sum())
    assert list(with_memory.texts(dataset.tokenizer)) == list(plain.texts(dataset.tokenizer))
    assert data(tmp_path, khop=khop(12)).fingerprint != dataset.fingerprint
