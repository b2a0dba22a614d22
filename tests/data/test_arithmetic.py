"""Generated arithmetic: right, the same every time, and no problem on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from valkyrie_core.data.corpus import ArithmeticCorpus, read_corpus

SMALL = {"documents": 60, "lines": 5}


def lines(corpus: ArithmeticCorpus, cache: Path) -> tuple[list[str], list[str]]:
    train, validation, dropped = read_corpus("a", corpus, cache=cache)
    assert not dropped
    found = [
        [line for document in side for line in document.pieces[0].text.splitlines()]
        for side in (train, validation)
    ]
    return found[0], found[1]


def test_every_line_is_right(tmp_path: Path) -> None:
    corpus = ArithmeticCorpus(**SMALL, digits=3, operations=("+", "-", "*"))
    train, validation = lines(corpus, tmp_path)
    assert len(train) == 300
    assert len(validation) == 15
    signs = set()
    for line in train + validation:
        problem, answer = line.split(" = ")
        left, sign, right = problem.split(" ")
        assert max(len(left), len(right)) <= 3
        made = {"+": int(left) + int(right), "-": int(left) - int(right)}
        assert int(answer) == made.get(sign, int(left) * int(right))
        signs.add(sign)
    assert signs == {"+", "-", "*"}


def test_validation_asks_what_training_never_shows(tmp_path: Path) -> None:
    train, validation = lines(ArithmeticCorpus(documents=400, lines=20, digits=2), tmp_path)
    assert not set(train) & set(validation)
    # with one digit there are few problems, and each is on one side
    train, validation = lines(ArithmeticCorpus(**SMALL, digits=1), tmp_path)
    assert not set(train) & set(validation)


def test_it_is_the_same_every_time_and_another_one_with_another_seed(tmp_path: Path) -> None:
    one, again = (lines(ArithmeticCorpus(**SMALL), tmp_path) for _ in range(2))
    assert one == again
    assert lines(ArithmeticCorpus(**SMALL, seed=1), tmp_path) != one
    digests = {
        ArithmeticCorpus(**{**SMALL, **change}).digest(tmp_path)
        for change in ({}, {"seed": 1}, {"digits": 3}, {"lines": 6})
    }
    assert len(digests) == 4
    assert ArithmeticCorpus(**SMALL, weight=2.0).digest(tmp_path) == ArithmeticCorpus(
        **SMALL
    ).digest(tmp_path)


def test_more_documents_leave_the_others_as_they_are(tmp_path: Path) -> None:
    few, _ = lines(ArithmeticCorpus(**SMALL), tmp_path)
    many, _ = lines(ArithmeticCorpus(**{**SMALL, "documents": 90}), tmp_path)
    assert many[: len(few)] == few


def test_nonsense_is_refused() -> None:
    for change in ({"operations": ()}, {"digits": 0}, {"lines": 0}, {"holdout": {"fraction": 1}}):
        with pytest.raises(ValidationError):
            ArithmeticCorpus.model_validate(change)
