"""From what a user typed to the designs that are compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.inventory import find_run, is_run
from valkyrie_core.recipe import Recipe
from valkyrie_core.recipe_files import find_recipe
from valkyrie_core.train.sitting import recipe_hash

RUN, RECIPE = "run:", "recipe:"
COSMETIC = ("name", "description", "seed", "runs_dir")
"""Keys of a recipe that are no part of its design."""
SUFFIXES = (".yaml", ".yml", ".json")


class Contender(NamedTuple):
    """One design."""

    name: str
    """Its name in the comparison; no two have the same."""
    source: str
    """What was typed."""
    recipe: Recipe


def contenders(arguments: Sequence[str], runs_dir: str) -> list[Contender]:
    """The designs that arguments name, in their order.

    Raises:
        UsageError: fewer than two, or a name that could be a recipe and a run.
        MissingError: there is no such recipe or run.
        RecipeError: a recipe is wrong.
    """
    if len(arguments) < 2:
        raise UsageError("a comparison needs two designs", hint="valkyrie compare baseline moe")
    found: list[Contender] = []
    for argument in arguments:
        recipe = _recipe_of(argument, runs_dir)
        names = [one.name for one in found]
        number = 2
        name = recipe.name
        while name in names:
            name, number = f"{recipe.name}-{number}", number + 1
        found.append(Contender(name, argument, recipe))
    return found


def design_hash(recipe: Recipe) -> str:
    """Identifies what is learned and how, whatever it is called and whichever seed it has."""
    tree = {
        key: value for key, value in recipe.model_dump(mode="json").items() if key not in COSMETIC
    }
    return recipe_hash(tree)


def _recipe_of(argument: str, runs_dir: str) -> Recipe:
    if argument.startswith(RUN):
        return _recorded(find_run(argument.removeprefix(RUN), runs_dir, usable=False).path)
    if argument.startswith(RECIPE):
        return Recipe.load(argument.removeprefix(RECIPE))
    if argument.endswith(SUFFIXES):
        return Recipe.load(argument)
    run = next((p for p in (Path(argument), Path(runs_dir) / argument) if is_run(p)), None)
    try:
        find_recipe(argument)
    except MissingError as error:
        if run is None:
            raise MissingError(
                f"there is no recipe and no run {argument!r}", hint=error.hint
            ) from None
        return _recorded(run)
    recipe = Recipe.load(argument)
    if run is not None and design_hash(_recorded(run)) != design_hash(recipe):
        raise UsageError(
            f"{argument!r} is a recipe and a run that was trained by another one",
            hint=f"say which: {RECIPE}{argument} or {RUN}{argument}",
        )
    return recipe


def _recorded(run: Path) -> Recipe:
    """The recipe that a run was trained by."""
    path = run / "recipe.json"
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MissingError(f"the recipe of the run {run.name} can't be read: {error}") from None
    return Recipe.from_json(path)
