"""A design as a recipe file: complete, with the reason at its top, and never over another file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from valkyrie_core.config import Config
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.recipe import Recipe, Resolved, resolve_bytes
from valkyrie_core.recipe_view import to_flow

WIDTH = 100
"""Columns of a comment, and of a section that stands on one line."""


def check_free(path: Path) -> None:
    """Raises UsageError where a file could not be written because something is there."""
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"{path} exists already", hint="name another file with --out, or remove this one first"
        )
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UsageError(f"{path} can't be written: {parent} is no folder")
            break


def recipe_text(
    resolved: Resolved, model: ModelConfig, *, suffix: str, reasons: list[str]
) -> tuple[str, Recipe]:
    """The text of a new recipe and what it loads as: the old values, `model.core` replaced.

    Args:
        suffix: what is added to the recipe's name.
        reasons: what stands at the top, a comment each.
    """
    tree = dict(resolved.source.tree)
    # a name has at most 100 characters
    tree["name"] = f"{resolved.recipe.name[: 100 - len(suffix) - 1]}-{suffix}"
    tree["model"] = {**tree["model"], "core": plain(model.core)}
    fitted = tree.get("train", {}).get("fit")
    if isinstance(fitted, dict):
        # what a run was fitted to is no business of a new one
        fit = {key: value for key, value in fitted.items() if key != "changed"}
        tree["train"] = {**tree["train"], "fit": fit}
    comments = [line for reason in reasons for line in _wrapped(reason)]
    text = "\n".join([*comments, *_lines(tree, 0)]) + "\n"
    recipe = resolve_bytes(text.encode(), "the new recipe").recipe
    if recipe.model != model:
        raise AssertionError("the recipe that was written is not the design")
    return text, recipe


def write_new(path: Path, text: str) -> None:
    """Writes a file that must not exist yet. Raises UsageError where it does."""
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error


def plain(value: Any) -> Any:
    """A section as it is written by hand: its type, and what differs from the defaults."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        given = {name: getattr(value, name) for name in fields}
        return {
            name: plain(item)
            for name, item in given.items()
            if name == "type" or item != fields[name].get_default()
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def _lines(tree: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for key, value in tree.items():
        start = f"{'  ' * depth}{to_flow(str(key))}:"
        line = f"{start} {to_flow(value)}"
        # what fits is one line, but the large sections of a recipe always open
        if isinstance(value, dict) and value and (depth == 0 or len(line) > WIDTH):
            lines += [start, *_lines(value, depth + 1)]
        else:
            lines.append(line)
    return lines


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) + 3 > WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [f"# {line}".rstrip() for line in lines]
