"""Every wrong recipe is told exactly: file, line, column, path, what is wrong, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wrong_recipes import CASES, RIGHT
from valkyrie_core.errors import RecipeError
from valkyrie_core.recipe import resolve_bytes


def read_expected() -> dict[str, str]:
    text = Path(__file__).with_name("wrong_recipes.txt").read_text(encoding="utf-8")
    sections = text.split("## ")[1:]
    return {name: told.strip() for name, _, told in (part.partition("\n") for part in sections)}


EXPECTED = read_expected()


def test_the_right_recipe_is_right() -> None:
    assert resolve_bytes(RIGHT.encode(), "r.yaml").recipe.name == "example"


def test_there_are_enough_and_all_are_expected() -> None:
    assert len(CASES) >= 60
    assert [name for name, _, _ in CASES] == list(EXPECTED)


@pytest.mark.parametrize(("name", "old", "new"), CASES, ids=[case[0] for case in CASES])
def test_wrong_recipe_is_told_exactly(name: str, old: str, new: str | bytes) -> None:
    text = new
    if old:
        assert isinstance(new, str)
        assert RIGHT.count(old) >= 1
        text = RIGHT.replace(old, new, 1)
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(RecipeError) as caught:
        resolve_bytes(data, "r.yaml")
    assert caught.value.message == EXPECTED[name]
    assert caught.value.exit_code == 3
