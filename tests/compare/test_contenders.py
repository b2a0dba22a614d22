"""What a user types is the design that was meant, or an error that says how to say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from valkyrie_core.compare.contenders import contenders, design_hash
from valkyrie_core.errors import MissingError, RecipeError, UsageError
from valkyrie_core.recipe import Recipe


def run_of(recipe: Recipe, folder: Path) -> Path:
    """A run's directory with the recipe that it was trained by."""
    place = folder / recipe.name
    place.mkdir(parents=True)
    recipe.save(place / "recipe.json")
    return place


def test_names_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(Recipe.load("tiny/rwkv7", ["name=mine"]).to_json())
    found = contenders(["tiny/hybrid", str(file)], str(tmp_path))
    assert [one.name for one in found] == ["tiny-hybrid", "mine"]
    assert found[1].source == str(file)


def test_one_recipe_twice_has_two_names(tmp_path: Path) -> None:
    found = contenders(["tiny/hybrid"] * 3, str(tmp_path))
    assert [one.name for one in found] == ["tiny-hybrid", "tiny-hybrid-2", "tiny-hybrid-3"]


def test_a_run_is_the_recipe_that_it_was_trained_by(tmp_path: Path) -> None:
    wide = Recipe.load("tiny/rwkv7", ["name=wide", "model.dim=64"])
    place = run_of(wide, tmp_path)
    for argument in ("wide", "run:wide", str(place)):
        found = contenders([argument, "tiny/hybrid"], str(tmp_path))
        assert found[0].recipe.model.dim == 64
        assert found[0].run is not None
        assert found[0].run.resolve() == place.resolve()


def test_a_name_that_is_both(tmp_path: Path) -> None:
    same = Recipe.load("quickstart", ["seed=7", "train.log_every=3"])
    # a run that is named by its recipe is looked at for trainings that are there
    place = run_of(same, tmp_path)
    # the same design, whatever its seed
    assert len(contenders(["quickstart", "tiny/hybrid"], str(tmp_path))) == 2
    Recipe.load("quickstart", ["model.dim=384"]).save(place / "recipe.json")
    with pytest.raises(UsageError, match="a recipe and a run") as caught:
        contenders(["tiny/hybrid", "quickstart"], str(tmp_path))
    assert caught.value.hint == "say which: recipe:quickstart or run:quickstart"
    assert (
        contenders(["recipe:quickstart", "tiny/hybrid"], str(tmp_path))[0].recipe.model.dim == 192
    )
    assert contenders(["run:quickstart", "tiny/hybrid"], str(tmp_path))[0].recipe.model.dim == 384


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no recipe and no run 'quikstart'") as caught:
        contenders(["quikstart", "tiny/hybrid"], str(tmp_path))
    assert "quickstart" in str(caught.value.hint)
    with pytest.raises(MissingError, match="no run"):
        contenders(["run:nothing", "tiny/hybrid"], str(tmp_path))
    with pytest.raises(UsageError, match="two designs"):
        contenders(["tiny/hybrid"], str(tmp_path))
    (tmp_path / "wrong.yaml").write_text("name: a\nmodle: {}\n")
    with pytest.raises(RecipeError, match="modle"):
        contenders([str(tmp_path / "wrong.yaml"), "tiny/hybrid"], str(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.json").write_text("{")
    with pytest.raises(MissingError, match="can't be read"):
        contenders(["run:broken", "tiny/hybrid"], str(tmp_path))


def test_a_design_is_not_its_name() -> None:
    plain = Recipe.load("tiny/hybrid")
    other = Recipe.load("tiny/hybrid", ["name=x", "seed=9", "runs_dir=y", "description=z"])
    assert design_hash(plain) == design_hash(other)
    for change in (
        "train.steps=7",
        "train.precision=bf16",
        "train.init_from=quickstart",
        "device=cpu",
        "train.activation_checkpointing=true",
    ):
        assert design_hash(plain) != design_hash(Recipe.load("tiny/hybrid", [change])), change
    logged = Recipe.load("tiny/hybrid", ["train.log_every=7", "train.keep_last=9"])
    assert design_hash(plain) == design_hash(logged)
