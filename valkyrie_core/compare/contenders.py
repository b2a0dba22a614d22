"""From what a user typed to the designs that are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.inventory import find_run, is_run
from valkyrie_core.recipe import Recipe
from valkyrie_core.recipe_files import find_recipe

RUN, RECIPE = "run:", "recipe:"
COSMETIC = ("name", "description", "seed", "runs_dir")
"""Keys of a recipe that are no part of its design."""
BOOKKEEPING = (
    *("eval_every", "eval_tokens", "log_every", "save_every"),
    *("keep_last", "sample_prompts", "track"),
)
"""Keys of `train` that change nothing that is learned or scored."""
SUFFIXES = (".yaml", ".yml", ".json")


class Contender(NamedTuple):
    """One design."""

    name: str
    """Its name in the comparison; no two have the same."""
    source: str
    """What was typed."""
    recipe: Recipe
    run: Path | None = None
    """The run that was named, whose recipe it is."""


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
        recipe, run = _recipe_of(argument, runs_dir)
        names = [one.name for one in found]
        number = 2
        name = recipe.name
        while name in names:
            name, number = f"{recipe.name}-{number}", number + 1
        found.append(Contender(name, argument, recipe, run))
    return found


def design_hash(recipe: Recipe) -> str:
    """Identifies what is learned and how, whatever it is called and whichever seed it has.

    Stricter than what a resumed run may change: where weights come from, the device and the
    precision are part of a design.
    """
    tree = recipe.model_dump(mode="json")
    for key in COSMETIC:
        del tree[key]
    for key in BOOKKEEPING:
        del tree["train"][key]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _recipe_of(argument: str, runs_dir: str) -> tuple[Recipe, Path | None]:
    if argument.startswith(RUN):
        place = find_run(argument.removeprefix(RUN), runs_dir, usable=False).path
        return _recorded(place), place
    if argument.startswith(RECIPE):
        return Recipe.load(argument.removeprefix(RECIPE)), None
    if argument.endswith(SUFFIXES):
        return Recipe.load(argument), None
    run = next((p for p in (Path(argument), Path(runs_dir) / argument) if is_run(p)), None)
    try:
        find_recipe(argument)
    except MissingError as error:
        if run is None:
            raise MissingError(
                f"there is no recipe and no run {argument!r}", hint=error.hint
            ) from None
        return _recorded(run), run
    recipe = Recipe.load(argument)
    if run is not None and design_hash(_recorded(run)) != design_hash(recipe):
        raise UsageError(
            f"{argument!r} is a recipe and a run that was trained by another one",
            hint=f"say which: {RECIPE}{argument} or {RUN}{argument}",
        )
    return recipe, run


def _recorded(run: Path) -> Recipe:
    """The recipe that a run was trained by."""
    path = run / "recipe.json"
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MissingError(f"the recipe of the run {run.name} can't be read: {error}") from None
    return Recipe.from_json(path)
