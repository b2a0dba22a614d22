"""What a recipe's text becomes before it is validated: a tree whose every value knows its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from valkyrie_core.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Where something stands in a recipe: ("model", "core", "pattern", 0)."""

_PLAIN_KEY = re.compile(r"[^\s.\"'=\x00-\x1f\x7f]+")
_SEGMENT = re.compile(r'"(?:[^"\\]|\\.)*"|[^."]+')
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class At:
    """A place: a line and a column of a file (both from 1), or an override (`line` counts them)."""

    file: str
    line: int = 0
    column: int = 0
    override: str | None = None

    def __str__(self) -> str:
        if self.override is not None:
            return f"--set {self.override}"
        return f"{self.origin}:{self.column}"

    @property
    def origin(self) -> str:
        """Where a value came from: `file:line`, or `--set`."""
        return f"{self.file}:{self.line}" if self.override is None else "--set"

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """Sorts the places of a file by line; overrides come after it."""
        return (self.override is not None, self.file, self.line, self.column)


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe."""

    at: At
    path: KeyPath
    message: str

    def __str__(self) -> str:
        # names that a recipe gives itself are part of messages: none of them may steer a terminal
        parts = [str(self.at), *([dotted(self.path)] if self.path else []), self.message]
        return printable(": ".join(parts))


@dataclass
class Source:
    """A recipe as it was written, overrides applied, and where everything in it stands.

    `keys` and `values` hold the place of every key and of every value by path; `problems` are the
    mistakes found so far that don't keep the rest from being read.
    """

    name: str
    tree: dict[str, Any]
    keys: dict[KeyPath, At] = field(default_factory=dict)
    values: dict[KeyPath, At] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def at_value(self, path: KeyPath) -> At:
        """The place of the value at `path`, or of the nearest section around it."""
        if path in self.values and path:
            return self.values[path]
        return self.at_key(path)

    def at_key(self, path: KeyPath) -> At:
        """The place of the key at `path`, or of the nearest section around it."""
        while path:
            place = self.keys.get(path) or self.values.get(path)
            if place is not None:
                return place
            path = path[:-1]
        return self.values.get((), At(self.name, 1, 1))

    def forget(self, path: KeyPath) -> None:
        """Drops the places of everything at and under `path`."""
        for places in (self.keys, self.values):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]

    def get(self, path: KeyPath) -> Any:
        """The value at `path`; None where there is none."""
        value: Any = self.tree
        for part in path:
            if isinstance(value, dict) and isinstance(part, str):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value


def fail(problems: Iterable[Problem]) -> RecipeError:
    """The error that tells all problems, one line each, in the order of the file."""
    ordered = sorted(problems, key=lambda problem: problem.at.order)
    return RecipeError("\n".join(dict.fromkeys(str(problem) for problem in ordered)))


def dotted(path: KeyPath) -> str:
    """A path as it is written after --set: `model.core.pattern.0`."""
    return ".".join(_key_text(part) for part in path)


def _key_text(part: str | int) -> str:
    text = str(part)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 3] + "..."
    if _PLAIN_KEY.fullmatch(text) and text.isprintable():
        return text
    return json.dumps(text)


def split_dotted(text: str) -> tuple[str, ...] | None:
    """The parts of a dotted path (a part with dots stands in double quotes); None if malformed."""
    parts = []
    position = 0
    while True:
        match = _SEGMENT.match(text, position)
        if match is None:
            return None
        part = match[0]
        if part.startswith('"'):
            try:
                part = json.loads(part)
            except ValueError:
                return None
        parts.append(part)
        position = match.end()
        if position == len(text):
            return tuple(parts)
        if text[position] != ".":
            return None
        position += 1


def printable(text: str) -> str:
    """The text with characters that steer a terminal shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value for an error message: short, on one line, nothing that steers a terminal."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 3] + "..."
    return text
