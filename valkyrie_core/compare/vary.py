"""A sweep: one recipe with several values of a key, or of a grid of keys."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from valkyrie_core.compare.contenders import Contender
from valkyrie_core.errors import UsageError
from valkyrie_core.recipe import Recipe

MOST_DESIGNS = 32
FIXED = ("name", "description", "runs_dir", "seed", "data")
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
        if key.partition(".")[0] in FIXED:
            raise UsageError(f"{key} can't be varied: all designs of a comparison share it")
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
        recipe = Recipe.load(argument, overrides)
        name = _name(keys, combination, {one.name for one in designs})
        source = " ".join([argument, *(f"--set {one}" for one in overrides)])
        designs.append(Contender(name, source, recipe))
    return designs, set(keys)


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


def _name(keys: Sequence[str], values: Sequence[str], taken: set[str]) -> str:
    """The last part of each key and its value, as far as a file's name can hold them."""
    parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in zip(keys, values, strict=True)]
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-.")[:LONGEST_NAME] or "design"
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}-{number}", number + 1
    return name
