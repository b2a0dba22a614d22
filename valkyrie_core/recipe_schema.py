"""What may stand where in a recipe, read off the configuration classes."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from valkyrie_core.config import Config
from valkyrie_core.recipe_source import KeyPath


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: its union's members without None, or itself."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    inner = (member for member in get_args(annotation) if member is not types.NoneType)
    return tuple(alternative for member in inner for alternative in members(member))


def sections(annotation: Any) -> tuple[type[Config], ...]:
    """The configuration classes that may stand at a place."""
    return tuple(
        member
        for member in members(annotation)
        if isinstance(member, type) and issubclass(member, Config)
    )


def type_names(section: type[Config]) -> tuple[str, ...]:
    """The values of `type` that name this class; none if it has no `type`."""
    field = section.model_fields.get("type")
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    return tuple(str(name) for name in get_args(field.annotation))


def is_union(annotation: Any) -> bool:
    """Whether `type` chooses between several classes at a place."""
    return len(sections(annotation)) > 1


def all_type_names(annotation: Any) -> tuple[str, ...]:
    """Every `type` that may stand at a place."""
    return tuple(name for section in sections(annotation) for name in type_names(section))


def chosen(annotation: Any, value: Any) -> type[Config] | None:
    """The class of the section `value`; None if it is no section or its `type` does not tell."""
    candidates = sections(annotation)
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    named = value.get("type") if isinstance(value, Mapping) else None
    for section in candidates:
        if named in type_names(section):
            return section
    return None


def item(annotation: Any) -> Any:
    """What a list or a mapping of free names holds; None if the place holds neither."""
    for member in members(annotation):
        origin, args = get_origin(member), get_args(member)
        if origin is dict:
            return args[1]
        if origin in (list, tuple) and args:
            return args[0]
    return None


def holds_names(annotation: Any) -> bool:
    """Whether the place is a mapping whose keys the recipe makes up."""
    return any(get_origin(member) is dict for member in members(annotation))


def step(annotation: Any, value: Any, part: str | int) -> Any:
    """The annotation one step below a place that holds `value`; None where nothing may stand."""
    section = chosen(annotation, value)
    if section is None:
        return item(annotation)
    field = section.model_fields.get(str(part))
    return None if field is None else field.annotation


def real_path(root: type[Config], loc: tuple[Any, ...]) -> tuple[KeyPath, Any]:
    """The path in the recipe of a pydantic location, and the annotation there.

    Pydantic puts the chosen alternative of every union into its locations; recipes have no such
    level.
    """
    annotation: Any = root
    path: list[str | int] = []
    rest = list(loc)
    while rest:
        alternatives = members(annotation)
        if len(alternatives) > 1:
            label = rest.pop(0)
            named = [member for member in sections(annotation) if label in type_names(member)]
            annotation = named[0] if named else annotation
            if not rest:
                break
        part = rest.pop(0)
        if part == "[key]":
            break
        path.append(part)
        section = next(iter(sections(annotation)), None)
        if section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        else:
            annotation = item(annotation) if section is None else None
    return tuple(path), annotation


def annotation_at(root: type[Config], tree: Any, path: KeyPath) -> Any:
    """The annotation at a path of a recipe; None where nothing may stand."""
    annotation: Any = root
    value = tree
    for part in path:
        annotation = step(annotation, value, part)
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            value = None
    return annotation


def all_keys(root: type[Config]) -> list[str]:
    """Every key that a recipe may hold somewhere."""
    return list(dict.fromkeys(key for _, section in _walk(root) for key in section.model_fields))


def places_of_key(root: type[Config], key: str) -> list[tuple[str, ...]]:
    """Every section that may hold `key`, as a path; names that a recipe makes up are `NAME`."""
    return list(dict.fromkeys(path for path, section in _walk(root) if key in section.model_fields))


def _walk(
    annotation: Any, path: tuple[str, ...] = (), above: frozenset[type[Config]] = frozenset()
) -> Iterator[tuple[tuple[str, ...], type[Config]]]:
    for section in sections(annotation):
        if section in above:
            continue
        yield path, section
        for name, field in section.model_fields.items():
            yield from _walk(field.annotation, (*path, name), above | {section})
    inside = item(annotation)
    if inside is not None:
        yield from _walk(inside, (*path, "NAME"), above)


def distance(left: str, right: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours between two words."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(right, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                best = min(best, last[j - 2] + 1)
            row.append(best)
    return row[-1]


def nearest(word: str, candidates: Iterable[str], *, loosely: bool = True) -> str | None:
    """The candidate that `word` was most likely meant to be; None if none is near.

    Near is a slip of a finger or two; `loosely` also takes what shares most of its letters.
    """
    names = list(candidates)
    # nobody types a key of this length by mistake, and the distance takes time
    if len(word) > 100:
        return None
    plain = word.lower().replace("-", "_")

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, plain, name.lower()).ratio()

    if not names:
        return None
    slips = {name: distance(plain, name.lower()) for name in names}
    best = min(names, key=lambda name: (slips[name], -likeness(name)))
    if slips[best] <= 1 + len(plain) // 5:
        return best
    best = max(names, key=likeness)
    return best if loosely and likeness(best) >= 0.6 else None
