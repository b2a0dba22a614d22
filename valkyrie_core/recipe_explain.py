"""What validation found, said so that it can be mended: one located line per mistake."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from valkyrie_core.config import Config
from valkyrie_core.recipe_schema import (
    all_keys,
    all_type_names,
    annotation_at,
    chosen,
    nearest,
    places_of_key,
    real_path,
    sections,
    type_names,
)
from valkyrie_core.recipe_source import KeyPath, Problem, Source, dotted, shown

_LEADING_PATH = re.compile(r"[a-z_][a-z0-9_]*(?:\.[A-Za-z0-9_-]+)*")
_UNQUOTED_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?")


def explain(error: ValidationError, source: Source, root: type[Config]) -> list[Problem]:
    """Every mistake that pydantic found, with its place in the source."""
    return _Explainer(source, root).explain(error)


class _Explainer:
    def __init__(self, source: Source, root: type[Config]) -> None:
        self.source = source
        self.root = root
        self.meant: set[KeyPath] = set()
        """The keys that unknown keys were most likely meant to be."""

    def explain(self, error: ValidationError) -> list[Problem]:
        problems: list[Problem] = []
        missing: list[Problem] = []
        known = [problem.path for problem in self.source.problems if problem.path]
        for detail in error.errors(include_url=False):
            path, annotation = real_path(self.root, detail["loc"])
            if any(path[: len(start)] == start for start in known):
                continue
            problem = self.problem(dict(detail), path, annotation)
            (missing if detail["type"] == "missing" else problems).append(problem)
        # a misspelt key is one mistake, not an unknown key and a missing one
        return problems + [problem for problem in missing if problem.path not in self.meant]

    def problem(self, detail: dict[str, Any], path: KeyPath, annotation: Any) -> Problem:
        kind = detail["type"]
        if kind == "extra_forbidden":
            return Problem(self.source.at_key(path), path, self.unknown_key(path))
        if kind == "missing":
            return Problem(self.source.at_key(path), path, _missing(self.help(path)))
        if kind == "union_tag_not_found":
            return self.no_type(path, annotation)
        if kind == "union_tag_invalid":
            path = (*path, "type")
            return Problem(self.source.at_value(path), path, self.unknown_type(path, annotation))
        if kind == "literal_error" and path[-1] == "type":
            parent = annotation_at(self.root, self.source.tree, path[:-1])
            return Problem(self.source.at_value(path), path, self.unknown_type(path, parent))
        if kind == "value_error":
            return self.misfit(detail["ctx"]["error"], path, annotation)
        message = _expected(detail)
        if not message.endswith("empty"):
            length = detail.get("ctx", {}).get("actual_length")
            message += f" (got {shown(detail['input']) if length is None else length})"
        return Problem(self.source.at_value(path), path, message)

    def help(self, path: KeyPath) -> str:
        parent = annotation_at(self.root, self.source.tree, path[:-1])
        for section in sections(parent):
            field = section.model_fields.get(str(path[-1]))
            if field is not None and field.description:
                return field.description
        return ""

    def unknown_key(self, path: KeyPath) -> str:
        key = str(path[-1])
        parent = annotation_at(self.root, self.source.tree, path[:-1])
        given = self.source.get(path[:-1])
        here = chosen(parent, given)
        fields = list(here.model_fields) if here else []
        free = [name for name in fields if name not in (given or {})]
        near = nearest(key, free, loosely=False)
        if near is None:
            elsewhere = self.elsewhere(key, parent, path)
            if elsewhere:
                return f"unknown key - '{key}' is a key of {elsewhere}"
            near = nearest(key, free) or nearest(key, fields)
        if near is None:
            distant = nearest(key, all_keys(self.root), loosely=False)
            elsewhere = self.elsewhere(distant, parent, path) if distant else None
            if elsewhere:
                return f"unknown key - did you mean '{distant}', a key of {elsewhere}?"
            return f"unknown key - the keys here are {', '.join(fields)}"
        self.meant.add((*path[:-1], near))
        return f"unknown key - did you mean '{near}'?"

    def elsewhere(self, key: str, parent: Any, path: KeyPath) -> str | None:
        """Where a key would be right: with another type, or in another section."""
        owners = [
            type_names(section)[0]
            for section in sections(parent)
            if key in section.model_fields and type_names(section)
        ]
        if owners:
            return f"type {_listed(owners, 'or')}"
        places = places_of_key(self.root, key)
        if not places or key == "type":
            return None

        def closeness(place: tuple[str, ...]) -> tuple[int, int]:
            shared = 0
            for left, right in zip(place, path, strict=False):
                if left not in (right, "NAME"):
                    break
                shared += 1
            return (-shared, len(place))

        place = min(places, key=closeness)
        return dotted(place) or "the recipe itself"

    def no_type(self, path: KeyPath, annotation: Any) -> Problem:
        """A section whose type is chosen by `type`, and no `type`."""
        types = all_type_names(annotation)
        given = self.source.get(path) or {}
        valid = {name for section in sections(annotation) for name in section.model_fields}
        wrong = nearest("type", [key for key in given if key not in valid], loosely=False)
        if wrong is not None:
            place = (*path, wrong)
            message = "unknown key - did you mean 'type'?"
            return Problem(self.source.at_key(place), place, message)
        fitting = [
            type_names(section)[0]
            for section in sections(annotation)
            if given and set(given) <= set(section.model_fields)
        ]
        message = f"missing key - the types are {', '.join(types)}"
        if len(fitting) == 1 and len(types) > 1:
            message += f"; these keys are of '{fitting[0]}'"
        return Problem(self.source.at_key(path), (*path, "type"), message)

    def unknown_type(self, path: KeyPath, annotation: Any) -> str:
        types = all_type_names(annotation)
        value = self.source.get(path)
        known = (
            f"the only type is {types[0]}"
            if len(types) == 1
            else (f"the types are {', '.join(types)}")
        )
        near = nearest(value, types) if isinstance(value, str) else None
        if near is not None:
            known = f"did you mean '{near}'? ({known})"
        return f"unknown type {shown(value)} - {known}"

    def misfit(self, error: Exception, path: KeyPath, annotation: Any) -> Problem:
        """Keys that don't fit each other: a validator says which, or its message begins with it."""
        message = str(error)
        at: KeyPath = tuple(getattr(error, "at", ()))
        match = _LEADING_PATH.match(message)
        section = next(iter(sections(annotation)), None)
        if not at and match is not None and section is not None:
            words = match[0].split(".")
            if words[0] in section.model_fields:
                at = tuple(words)
        path = (*path, *at)
        return Problem(self.source.at_value(path), path, message)


def _missing(text: str) -> str:
    first_sentence = re.split(r"[.;:] |\.$", text.replace("\n", " "), maxsplit=1)[0]
    return f"missing key ({first_sentence})" if first_sentence else "missing key"


def _listed(words: list[str], conjunction: str) -> str:
    quoted = [f"'{word}'" for word in words]
    if len(quoted) == 1:
        return quoted[0]
    return f"{', '.join(quoted[:-1])} {conjunction} {quoted[-1]}"


def _expected(detail: dict[str, Any]) -> str:
    """What should stand at a place, and how to write it."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in ("int_type", "int_from_float", "float_type"):
        noun = "a number" if kind == "float_type" else "an integer"
        return f"should be {noun}{_number_hint(value, whole=kind != 'float_type')}"
    if kind == "literal_error":
        near = None
        if isinstance(value, str):
            near = nearest(value, re.findall(r"'([^']*)'", context["expected"]))
        return f"should be {context['expected']}" + (f" - did you mean '{near}'?" if near else "")
    if kind == "string_type":
        quotes = " - put it in quotes" if isinstance(value, bool | int | float) else ""
        return f"should be text{quotes}"
    if kind in ("tuple_type", "list_type"):
        brackets = f" - write [{value}]" if isinstance(value, str) and value.isidentifier() else ""
        return f"should be a list{brackets}"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "should be a section of keys and values"
    templates = {
        "too_short": "should have {min_length} items or more",
        "too_long": "should have {max_length} items or less",
        "bool_type": "should be true or false",
        "finite_number": "should be a finite number",
        "string_pattern_mismatch": "should match {pattern}",
        "string_too_short": "should have at least {min_length} characters",
        "string_too_long": "should have at most {max_length} characters",
        "greater_than": "should be greater than {gt}",
        "greater_than_equal": "should be at least {ge}",
        "less_than": "should be less than {lt}",
        "less_than_equal": "should be at most {le}",
    }
    if kind in ("string_too_short", "too_short") and context["min_length"] == 1:
        return "should not be empty"
    if kind in templates:
        return templates[kind].format_map(
            {
                name: int(bound) if isinstance(bound, float) and bound.is_integer() else bound
                for name, bound in context.items()
            }
        )
    text: str = detail["msg"]
    return re.sub(r"^Input should", "should", text)


def _number_hint(value: Any, *, whole: bool) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f" - write {int(value)}"
    if isinstance(value, str) and len(value) < 40 and _UNQUOTED_NUMBER.fullmatch(value):
        number = value.replace("_", "")
        if whole and not number.lstrip("+-").isdigit():
            return ""
        return f" - write {number}" + (" without quotes" if "_" not in value else "")
    return ""
