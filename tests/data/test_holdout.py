from __future__ import annotations

import pytest

from tests.data.helpers import documents
from valkyrie_core.data.documents import text_document
from valkyrie_core.data.holdout import FractionHoldout, NamesHoldout
from valkyrie_core.errors import RecipeError


def test_the_fraction_is_about_right_and_stable() -> None:
    many = documents(1000)
    train, validation = FractionHoldout(fraction=0.2).split(many)
    assert len(train) + len(validation) == 1000
    assert 150 < len(validation) < 250
    held = {document.name for document in validation}
    # others come and go, in any order: a document stays on its side
    fewer_train, fewer_held = FractionHoldout(fraction=0.2).split(many[900:300:-1])
    assert {d.name for d in fewer_held} <= held
    assert not {d.name for d in fewer_train} & held


def test_equal_documents_are_on_one_side() -> None:
    twice = documents(50) + documents(50)
    train, validation = FractionHoldout(fraction=0.3).split(twice)
    assert not {d.content_hash for d in train} & {d.content_hash for d in validation}


@pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.9999])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_side_is_ever_empty(fraction: float, count: int) -> None:
    train, validation = FractionHoldout(fraction=fraction).split(documents(count))
    assert train
    assert validation
    assert len(train) + len(validation) == count


def test_one_document_can_not_be_split() -> None:
    with pytest.raises(RecipeError, match="there is only one document") as caught:
        FractionHoldout().split(documents(1))
    assert caught.value.hint is not None
    assert "holdout: {type: files" in caught.value.hint


def test_names_match_path_or_last_part_without_case() -> None:
    plays = [text_document(f"plays/tragedies/{n}.md", n) for n in ("Hamlet", "macbeth", "othello")]
    for pattern in ("*MACBETH*", "macbeth.md", "plays/*/macbeth.md"):
        train, validation = NamesHoldout(names=(pattern,)).split(plays)
        assert [d.name for d in validation] == ["plays/tragedies/macbeth.md"]
        assert len(train) == 2
    _, validation = NamesHoldout(names=("hamlet.*", "*oth*")).split(plays)
    assert [d.text for d in validation] == ["Hamlet", "othello"]


def test_names_that_match_nothing_name_the_nearest() -> None:
    plays = [text_document(f"plays/{n}.md", n) for n in ("hamlet", "macbeth")]
    with pytest.raises(RecipeError) as caught:
        NamesHoldout(names=("*hamlet*", "*macbet.md")).split(plays)
    assert caught.value.message == "holdout.names: '*macbet.md' matches none of 2 documents"
    assert caught.value.hint is not None
    assert "did you mean 'plays/macbeth.md'" in caught.value.hint


def test_names_must_leave_something_to_train_on() -> None:
    with pytest.raises(RecipeError, match="holds out every document"):
        NamesHoldout(names=("*",)).split(documents(3))
