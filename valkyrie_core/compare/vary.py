"""A sweep: one recipe with several values of a key, or of a grid of keys."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from valkyrie_core.compare.contenders import BOOKKEEPING, Contender, design_hash
from valkyrie_core.errors import RecipeError, UsageError
from valkyrie_core.recipe import Recipe

MOST_DESIGNS = 32
FIXED = (
    *("name", "description", "runs_dir", "seed", "data"),
    *("train.steps", *(f"train.{key}" for key in BOOKKEEPING)),
)
"""Keys that all designs of a comparison share, or that are no part of one."""
LONGEST_NAME = 80


def varied(argument: str, vary: Sequence[str]) -> tuple[list[Contender], set[str]]:
    """Every combination of the values that `KEY=V1,V2` lists, the first ones first; and the keys.

    Raises:
        UsageError: a key or its values can't be compared.
        RecipeError, MissingError: the recipe, a key or a value is wrong.
    """
    keys: list[str] = []
    values: list[list[str]] = []
    for text in vary:
        key, sign, listed = text.partition("=")
        key = key.strip()
        found = split_values(listed)
        if not sign or not key or len(found) < 2:
            raise UsageError(
                f"--vary {text!r} lists no values", hint="--vary train.optimizer.lr=0.01,0.02"
            )
        if any(f"{key}.".startswith(f"{fixed}.") for fixed in FIXED):
            raise UsageError(
                f"{key} can't be varied: all designs of a comparison share it",
                hint="--steps N trains all of them longer" if key == "train.steps" else None,
            )
        if key in keys:
            raise UsageError(f"--vary {key} is there twice")
        if len(set(found)) < len(found):
            raise UsageError(f"--vary {text!r} has a value twice")
        keys.append(key)
        values.append(found)
    combinations = list(itertools.product(*values))
    if len(combinations) > MOST_DESIGNS:
        raise UsageError(f"{len(combinations)} designs are more than {MOST_DESIGNS}")
    designs: list[Contender] = []
    for combination in combinations:
        overrides = [f"{key}={value}" for key, value in zip(keys, combination, strict=True)]
        recipe = _loaded(argument, overrides)
        name = _name(keys, combination, {one.name for one in designs})
        other = next((x for x in designs if design_hash(x.recipe) == design_hash(recipe)), None)
        if other is not None:
            raise UsageError(f"{name} is the same design as {other.name}")
        source = " ".join([argument, *(f"--set {one}" for one in overrides)])
        designs.append(Contender(name, source, recipe))
    return designs, set(keys)


def _loaded(argument: str, overrides: Sequence[str]) -> Recipe:
    try:
        return Recipe.load(argument, overrides)
    except RecipeError as error:
        # what was typed is told
        told = error.message.replace("--set ", "--vary ")
        if told == error.message:
            told = f"{told} (with {', '.join(overrides)})"
        raise RecipeError(told, hint=error.hint) from error


def split_values(text: str) -> list[str]:
    """At commas, but not at those inside brackets or quotes."""
    found, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            found.append("")
            continue
        found[-1] += character
    return [value.strip() for value in found if value.strip()]


def _short(keys: Sequence[str]) -> list[str]:
    """As many last parts of each key as tell it from the others."""
    for count in range(1, 1 + max(key.count(".") + 1 for key in keys)):
        found = [".".join(key.split(".")[-count:]) for key in keys]
        if len(set(found)) == len(keys):
            return found
    return list(keys)


def _name(keys: Sequence[str], values: Sequence[str], taken: set[str]) -> str:
    """The last part of each key and its value, as far as a file's name can hold them."""
    parts = [f"{key}-{value}" for key, value in zip(_short(keys), values, strict=True)]
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-.")[:LONGEST_NAME] or "design"
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}-{number}", number + 1
    return name
