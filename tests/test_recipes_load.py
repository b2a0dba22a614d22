"""Every recipe in the repository loads, and its resolved form is the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from valkyrie_core.recipe import Recipe, resolve, resolve_bytes
from valkyrie_core.recipe_view import to_yaml, value_rows

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.rglob("*.y*ml"))


def test_there_are_recipes() -> None:
    assert FILES
    assert all(path.suffix == ".yaml" for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_loads_and_survives_json_and_yaml(path: Path, tmp_path: Path) -> None:
    resolved = resolve(path)
    recipe = resolved.recipe
    recipe.save(tmp_path / "recipe.json")
    stored = Recipe.from_json(tmp_path / "recipe.json")
    assert stored == recipe
    assert stored.fingerprint() == recipe.fingerprint()
    shown = to_yaml(value_rows(resolved), with_help=True)
    assert resolve_bytes(shown.encode(), "shown.yaml").recipe == recipe
    assert recipe.description, "says what the experiment is for"


def test_names_of_runs_are_unique() -> None:
    names = [Recipe.load(path).name for path in FILES]
    assert len(set(names)) == len(names)
