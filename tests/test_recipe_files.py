"""Where a recipe is found: a path, recipes/ of the current folder, the packaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wrong_recipes import RIGHT
from valkyrie_core import recipe_files
from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.recipe_files import copy_recipe, find_recipe, list_recipes


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packaged folder with `alpha` and `tiny/beta`; the current folder is empty."""
    folder = tmp_path / "site" / "recipes"
    write(folder / "alpha.yaml", "packaged alpha")
    write(folder / "tiny" / "beta.yaml", "packaged beta")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(recipe_files, "packaged_recipes", lambda: folder)
    return folder


def write(path: Path, description: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = RIGHT.replace("Two corpora, two kinds of layers.", description)
    path.write_text(text, encoding="utf-8")


def test_a_name_reaches_the_packaged_recipes(packaged: Path) -> None:
    assert find_recipe("alpha") == packaged / "alpha.yaml"
    assert find_recipe("beta") == find_recipe("tiny/beta") == packaged / "tiny" / "beta.yaml"


def test_the_current_folder_comes_first(packaged: Path) -> None:
    write(Path("recipes/alpha.yaml"), "my alpha")
    assert find_recipe("alpha") == Path("recipes/alpha.yaml")
    assert find_recipe(packaged / "alpha.yaml") == packaged / "alpha.yaml"
    rows = {row.name: row for row in list_recipes()}
    assert list(rows) == ["alpha", "tiny/beta"]
    assert (rows["alpha"].source, rows["alpha"].description) == ("here", "my alpha")
    assert rows["tiny/beta"].source == "packaged"


def test_what_has_a_suffix_is_a_path(packaged: Path) -> None:
    with pytest.raises(MissingError) as caught:
        find_recipe("recipes/alpha.yaml")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean alpha?")
    write(Path("other.yaml"), "other")
    assert find_recipe("other.yaml") == Path("other.yaml")


@pytest.mark.parametrize("name", ["aplha", "Alpha", "tiny/alpah", "alpha.yml"])
def test_a_misspelt_name_gets_the_nearest(packaged: Path, name: str) -> None:
    with pytest.raises(MissingError, match="there is no recipe") as caught:
        find_recipe(name)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean alpha?")


def test_a_name_unlike_any_gets_all(packaged: Path) -> None:
    with pytest.raises(MissingError) as caught:
        find_recipe("zzzzzz")
    assert caught.value.hint == "the recipes are alpha, tiny/beta"


@pytest.mark.parametrize("name", ["../here/x", "a\0b", "x" * 5000, "", ".", "/", "-"])
def test_strange_names_are_missing(packaged: Path, name: str) -> None:
    with pytest.raises(MissingError):
        find_recipe(name)


def test_a_wrong_recipe_is_listed_too(packaged: Path) -> None:
    (packaged / "broken.yaml").write_text("- a\n", encoding="utf-8")
    row = next(row for row in list_recipes() if row.name == "broken")
    assert "a recipe is a mapping" in row.description


def test_copy_keeps_comments_and_never_overwrites(packaged: Path) -> None:
    target = copy_recipe("alpha")
    assert target == Path("recipes/alpha.yaml")
    assert target.read_bytes() == (packaged / "alpha.yaml").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        copy_recipe("alpha")
    assert copy_recipe("alpha", "deep/folder/mine.yaml") == Path("deep/folder/mine.yaml")
    assert copy_recipe("beta", "deep") == Path("deep/beta.yaml")
    with pytest.raises(UsageError, match="not a folder"):
        copy_recipe("alpha", "recipes/alpha.yaml/x.yaml")


def test_an_endless_file_is_not_read_whole() -> None:
    assert len(recipe_files.read_recipe_bytes(Path("/dev/zero"))) <= 1 << 21


def test_this_checkout_has_its_recipes() -> None:
    assert (recipe_files.packaged_recipes() / "tiny").is_dir()
