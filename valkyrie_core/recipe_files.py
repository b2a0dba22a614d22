"""Where recipes are: a path, a name in `recipes/` of the current folder, or one that ships."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from valkyrie_core.errors import MissingError, RecipeError, UsageError
from valkyrie_core.recipe_schema import nearest
from valkyrie_core.recipe_yaml import MAX_BYTES, read_yaml

_SUFFIXES = (".yaml", ".yml", ".json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class RecipeRow:
    """One recipe that a bare name reaches."""

    name: str
    """What to type: `quickstart`, `tiny/hybrid`."""
    path: str
    description: str
    """The recipe's own, or what is wrong with it."""
    source: str
    """`here` (recipes/ of the current folder) or `packaged`."""


def packaged_recipes() -> Path:
    """The folder of the recipes that ship with valkyrie."""
    package = Path(__file__).parent
    inside = package / "recipes"
    # a checkout has them beside the package; the wheel carries them inside
    return inside if inside.is_dir() else package.parent / "recipes"


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe. Raises MissingError, with the nearest names.

    What ends in .yaml, .yml or .json is a path. Anything else is a name: `recipes/NAME.yaml` and
    `recipes/tiny/NAME.yaml` of the current folder, then the recipes that ship; then a path.
    """
    text = str(path_or_name)
    path = Path(text)
    is_name = isinstance(path_or_name, str) and path.suffix not in _SUFFIXES
    try:
        named = _named(text) if is_name and _NAME.fullmatch(text) else None
        if named is not None:
            return named
        if path.is_dir():
            raise MissingError(f"{text} is a folder, not a recipe", hint=_suggestion(path.name))
        exists = path.exists()
    except OSError as error:
        raise MissingError(f"{text} can't be read: {error.strerror}") from error
    if not exists:
        raise MissingError(f"there is no recipe {text}", hint=_suggestion(text))
    return path


def _named(name: str) -> Path | None:
    for _, folder in _folders():
        for candidate in (folder / f"{name}.yaml", folder / "tiny" / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    return None


def read_recipe_bytes(path: Path) -> bytes:
    """The bytes of a recipe file, one more than allowed at most. Raises MissingError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MissingError(f"{path} can't be read: {error.strerror}") from error


def list_recipes() -> list[RecipeRow]:
    """Every recipe that a bare name reaches, in the order of names; files here hide packaged ones.

    Only name and description are read, so a wrong recipe is listed too.
    """
    rows: dict[str, RecipeRow] = {}
    for source, folder in _folders():
        for name, path in _recipes_in(folder):
            if name not in rows:
                rows[name] = RecipeRow(name, str(path), _description(path), source)
    return [rows[name] for name in sorted(rows, key=lambda name: ("/" in name, name))]


def copy_recipe(path_or_name: str, destination: str | Path | None = None) -> Path:
    """Copies a recipe's text, comments and all; returns the new file.

    Left out, the destination is `recipes/NAME.yaml` of the current folder, where a bare name finds
    it before the packaged one. A destination that is a folder gets the file's name. Raises
    UsageError rather than overwrite.
    """
    source = find_recipe(path_or_name)
    if destination is None:
        target = Path("recipes", source.name)
    else:
        target = Path(destination)
        if target.is_dir():
            target = target / source.name
    data = read_recipe_bytes(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{target.parent} is not a folder") from None
    try:
        with target.open("xb") as file:
            file.write(data)
    except FileExistsError:
        raise UsageError(
            f"{target} exists already", hint="name another file, or remove this one first"
        ) from None
    return target


def _folders() -> Iterator[tuple[str, Path]]:
    here, packaged = Path("recipes"), packaged_recipes()
    if here.is_dir():
        yield "here", here
    if packaged.is_dir() and packaged.resolve() != here.resolve():
        yield "packaged", packaged


def _recipes_in(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
        yield path.relative_to(folder).with_suffix("").as_posix(), path


def _description(path: Path) -> str:
    try:
        tree = read_yaml(read_recipe_bytes(path), str(path)).tree
    except (RecipeError, MissingError) as error:
        return f"(wrong: {error.message.splitlines()[0]})"
    return str(tree.get("description") or "")


def _suggestion(text: str) -> str:
    """The recipes that `text` may have meant; all of them if none is near."""
    names = [row_name for _, folder in _folders() for row_name, _ in _recipes_in(folder)]
    names = list(dict.fromkeys(names))
    wanted = Path(text).stem
    by_stem = {Path(name).name: name for name in reversed(names)}
    near = wanted if wanted in by_stem else nearest(wanted, by_stem)
    if near is not None:
        return f"did you mean {by_stem[near]}? (`valkyrie recipe list` shows all)"
    return f"the recipes are {', '.join(names)}" if names else "`valkyrie recipe list` shows all"
