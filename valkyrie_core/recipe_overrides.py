"""`--set a.b.c=value`: one value of a recipe replaced, by the path it has in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from valkyrie_core.config import Config
from valkyrie_core.recipe_schema import all_type_names, annotation_at, chosen, is_union
from valkyrie_core.recipe_source import At, KeyPath, Problem, Source, dotted, split_dotted
from valkyrie_core.recipe_yaml import StopReadingError, read_value

Overrides = Sequence[str] | Mapping[str, Any]
"""`["train.steps=100"]` as after --set, or `{"train.steps": 100}`."""
_SHOWN_CHARACTERS = 60


def apply_overrides(source: Source, overrides: Overrides, root: type[Config]) -> None:
    """Replaces values of `source`, in the order given; mistakes go to its problems.

    An override changes the value it names and nothing else: one that steps into a section which
    the file leaves out starts from that section's default. The `type` of a section is the
    exception: with another type, the other keys of the section that come from the file mean
    nothing any more and are dropped (those set by overrides stay).
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{path}={_as_json(value)}" for path, value in overrides.items()]
    for index, override in enumerate(overrides):
        try:
            _apply(source, override, index, root)
        except StopReadingError as stop:
            source.problems.append(stop.problem)


def _as_json(value: Any) -> str:
    # JSON is YAML, but for numbers that are not finite
    names = {float("inf"): ".inf", float("-inf"): "-.inf"}
    if isinstance(value, float) and value in names:
        return names[value]
    return ".nan" if value != value else json.dumps(value, default=str)


def _not_applicable(at: At, message: str) -> StopReadingError:
    return StopReadingError(Problem(at, (), message))


def _apply(source: Source, override: str, index: int, root: type[Config]) -> None:
    left, equals, text = override.partition("=")
    label = override if len(override) <= _SHOWN_CHARACTERS else f"{left}=..."
    at = At("", line=index, override=label)
    keys = split_dotted(left.strip())
    if not equals or keys is None:
        raise _not_applicable(at, "an override is path=value, such as train.steps=100")
    value, problems = read_value(text, at)
    *parents, last = keys
    path: KeyPath = ()
    section: Any = source.tree
    for key in parents:
        part = _part(section, key, path, at)
        path = (*path, part)
        section = _enter(source, section, path, at, root)
    part = _part(section, last, path, at)
    if part == "type" and isinstance(section, dict):
        _switch_type(source, section, path, value, root)
    path = (*path, part)
    section[part] = value
    source.forget(path)
    source.problems = [p for p in source.problems if p.path[: len(path)] != path]
    source.problems += [Problem(p.at, (*path, *p.path), p.message) for p in problems]
    source.keys[path] = at
    source.values.update(dict.fromkeys(_paths_in(value, path), at))


def _paths_in(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _paths_in(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _paths_in(child, (*path, index))


def _part(section: Any, key: str, path: KeyPath, at: At) -> str | int:
    """The key as it is used in `section`: a name in a mapping, an index in a list."""
    if isinstance(section, dict):
        return key
    if isinstance(section, list):
        if key.isascii() and key.isdigit() and len(key) < 6 and int(key) < len(section):
            return int(key)
        count = f"{len(section)} item{'s' if len(section) != 1 else ''}"
        indices = f" (0 to {len(section) - 1})" if section else ""
        raise _not_applicable(at, f"{dotted(path)} is a list of {count}{indices}")
    raise _not_applicable(at, f"{dotted(path)} is a value, not a section")


def _enter(source: Source, section: Any, path: KeyPath, at: At, root: type[Config]) -> Any:
    """The section at `path`, made if the recipe leaves it out."""
    part = path[-1]
    inside = source.get(path)
    if inside is not None:
        return inside
    section[part] = _default(source, path, root)
    source.forget(path)
    source.keys[path] = source.values[path] = at
    return section[part]


def _default(source: Source, path: KeyPath, root: type[Config]) -> Any:
    """What a place holds that the recipe leaves out, as plain data; {} without default."""
    parent = chosen(annotation_at(root, source.tree, path[:-1]), source.get(path[:-1]))
    field = parent.model_fields.get(str(path[-1])) if parent else None
    default = None if field is None or field.is_required() else field.get_default()
    if isinstance(default, Config):
        return default.model_dump(mode="json")
    if isinstance(default, tuple):
        return list(default)
    return {}


def _switch_type(
    source: Source, section: dict[str, Any], path: KeyPath, value: Any, root: type[Config]
) -> None:
    annotation = annotation_at(root, source.tree, path)
    if not is_union(annotation) or value not in all_type_names(annotation):
        return
    if section.get("type") in (None, value):
        return
    for key in [key for key in section if key != "type"]:
        child = (*path, key)
        under = [at for known, at in source.values.items() if known[: len(child)] == child]
        if not any(at.override is not None for at in under):
            del section[key]
            source.forget(child)
