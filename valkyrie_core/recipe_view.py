"""Recipes as people and editors read them: with origins, side by side, as a JSON Schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from valkyrie_core.config import Config
from valkyrie_core.recipe import Recipe, Resolved
from valkyrie_core.recipe_scalar import resolve_plain
from valkyrie_core.recipe_source import KeyPath, Source, dotted

_PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_COMMENT_COLUMN = 56


@dataclass(frozen=True)
class ValueRow:
    """One value of a resolved recipe."""

    parts: KeyPath
    value: Any
    """Plain data, as in JSON."""
    origin: str
    """`file:line`, `--set`, `default`, or `derived` (from other values of the recipe)."""
    help: str
    """The key's documentation."""

    @property
    def path(self) -> str:
        """The path as it is written after --set."""
        return dotted(self.parts)


@dataclass(frozen=True)
class DiffRow:
    """One value in which two recipes differ."""

    path: str
    left: Any
    right: Any
    side: Literal["both", "left", "right"]
    """Which recipe has the key at all."""


def value_rows(resolved: Resolved) -> list[ValueRow]:
    """Every value of a recipe, in the order of the schema, with origin and help."""
    return list(_rows(resolved.recipe, (), resolved.source, None))


def _rows(section: Config, path: KeyPath, source: Source, default: Any) -> Iterator[ValueRow]:
    """`default` is what the section would be if the recipe left it out; None if unknown."""
    for name, field in type(section).model_fields.items():
        usual = field.get_default()
        if isinstance(default, type(section)):
            usual = getattr(default, name)
        text = field.description or ""
        if name == "type":
            text = (type(section).__doc__ or "").partition("\n")[0]
        yield from _value_rows(getattr(section, name), (*path, name), source, usual, text)


def _value_rows(
    value: Any, path: KeyPath, source: Source, usual: Any, text: str
) -> Iterator[ValueRow]:
    if isinstance(value, Config) and type(value).model_fields:
        # keys left out of a section that the file names fall back to the class, not to `usual`
        named = path in source.values
        yield from _rows(value, path, source, None if named else usual)
    elif isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _value_rows(child, (*path, key), source, None, text)
    elif isinstance(value, tuple) and value and all(isinstance(v, Config) for v in value):
        for index, child in enumerate(value):
            yield from _value_rows(child, (*path, index), source, None, text)
    else:
        yield ValueRow(path, _plain_data(value), _origin(value, path, source, usual), text)


def _plain_data(value: Any) -> Any:
    # a section without keys is there or not: its presence is all it says
    return {} if isinstance(value, Config) else json.loads(json.dumps(value))


def _origin(value: Any, path: KeyPath, source: Source, usual: Any) -> str:
    if path in source.values:
        under = [at for known, at in source.values.items() if known[: len(path)] == path]
        if any(at.override is not None for at in under):
            return "--set"
        return source.values[path].origin
    # an override of a neighbour puts a section's default into the tree: it is still the default
    if value == usual or source.get(path) is not None:
        return "default"
    return "derived"


def to_yaml(rows: list[ValueRow], *, with_help: bool = False) -> str:
    """The values as a complete recipe in YAML, the origin of each in a comment."""
    lines: list[str] = []
    above: KeyPath = ()
    for row in rows:
        *sections, last = row.parts
        shared = 0
        while shared < min(len(sections), len(above)) and sections[shared] == above[shared]:
            shared += 1
        for depth in range(shared, len(sections)):
            lines.append("  " * depth + _key(sections[depth]))
        above = tuple(sections)
        indent = "  " * len(sections)
        if with_help and row.help:
            lines.append(f"{indent}# {' '.join(row.help.split())}")
        origin = re.sub(r".*:(\d+)$", r"line \1", row.origin, flags=re.DOTALL)
        line = f"{indent}{_key(last)} {to_flow(row.value)}"
        lines.append(f"{line:<{_COMMENT_COLUMN}}  # {origin}")
    return "\n".join(lines) + "\n"


def _key(part: str | int) -> str:
    return "-" if isinstance(part, int) else f"{to_flow(part)}:"


def to_flow(value: Any) -> str:
    """A value on one line of YAML 1.2 that reads back as the same value."""
    if isinstance(value, str):
        if _PLAIN_TEXT.fullmatch(value) and isinstance(resolve_plain(value), str):
            return value
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, list):
        return f"[{', '.join(to_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_flow(k)}: {to_flow(v)}' for k, v in value.items())}}}"
    return json.dumps(value)


def diff_recipes(left: Resolved, right: Resolved) -> list[DiffRow]:
    """The values in which two resolved recipes differ, in the order of the schema."""
    lefts = {row.path: row.value for row in value_rows(left)}
    rights = {row.path: row.value for row in value_rows(right)}
    paths = list(lefts)
    position = 0
    for path in rights:
        if path not in lefts:
            paths.insert(position, path)
        position = paths.index(path) + 1
    rows = []
    for path in paths:
        if path not in rights:
            rows.append(DiffRow(path, lefts[path], None, "left"))
        elif path not in lefts:
            rows.append(DiffRow(path, None, rights[path], "right"))
        elif lefts[path] != rights[path]:
            rows.append(DiffRow(path, lefts[path], rights[path], "both"))
    return rows


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe file; editors check and complete with it."""
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    for reference in set(_union_members(schema)):
        # pydantic lets `type` have a default; where it chooses the class, a recipe must name it
        definition = definitions[reference.rpartition("/")[2]]
        definition["required"] = sorted({"type", *definition.get("required", [])})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Valkyrie recipe",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _union_members(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _union_members(item)
    elif isinstance(schema, dict):
        if "discriminator" in schema:
            yield from schema["discriminator"]["mapping"].values()
        for item in schema.values():
            yield from _union_members(item)
