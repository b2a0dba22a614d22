"""Whatever is fed to the reader, nothing but RecipeError escapes; typos find their key."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wrong_recipes import RIGHT
from valkyrie_core.config import Config
from valkyrie_core.errors import RecipeError
from valkyrie_core.recipe import Recipe, resolve_bytes, validate
from valkyrie_core.recipe_schema import (
    distance,
    holds_names,
    is_union,
    item,
    nearest,
    sections,
    type_names,
)
from valkyrie_core.recipe_source import Source
from valkyrie_core.recipe_view import to_yaml, value_rows

LOCATED = re.compile(r"(r\.yaml:[1-9]\d*:[1-9]\d*|--set .*): .+")
NASTY = [
    "", " ", "\t", "\n", "\r", ":", ": ", "- ", "[", "]", "{", "}", ",", "'", '"', "|", ">", "&a ",
    "*a", "!", "!!python/name:os.system ", "%", "@", "`", "?", "? ", "<<: ", "---\n", "...\n", "#",
    "~", "null", "true", "1e999", "-1", ".nan", "9" * 500, "0x" + "f" * 500, "\x00", "\x85",
    "\u2028", "\ufeff", "\ud7ff", "😀", '"\\ud800"', '"\\UFFFFFFFF"', "type: ", "1:2", "\\",
]  # fmt: skip


def check(data: bytes, overrides: tuple[str, ...] = ()) -> None:
    """Loads to a recipe that can be stored and shown, or is told line by line."""
    message = ""
    try:
        resolved = resolve_bytes(data, "r.yaml", overrides)
    except RecipeError as error:
        message = error.message
    if message:
        assert all(LOCATED.fullmatch(line) for line in message.split("\n")), message
        assert message.replace("\n", "").isprintable()
        return
    assert resolve_bytes(resolved.recipe.to_json().encode(), "r.json").recipe == resolved.recipe
    shown = to_yaml(value_rows(resolved))
    assert resolve_bytes(shown.encode(), "shown.yaml").recipe == resolved.recipe


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_raw_bytes(data: bytes) -> None:
    check(data)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:- \n\t[]{},'\"|>&*!%@`?#<~.0123e\\\r"), max_size=60))
def test_raw_punctuation(text: str) -> None:
    check(text.encode())


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(RIGHT)),
            st.integers(0, 12),
            st.one_of(st.sampled_from(NASTY), st.text(max_size=8)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_edited_recipes(edits: list[tuple[int, int, str]]) -> None:
    text = RIGHT
    for start, length, new in edits:
        text = text[:start] + new + text[start + length :]
    check(text.encode("utf-8", "surrogatepass"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 2**64])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["rwkv7", "type", "adamw", "rwkv"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "lr", "a.b", "", "mixer"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    entries = tree.items() if isinstance(tree, dict) else ()
    for key, value in entries:
        yield from paths(value, (*path, key))


FULL = json.loads(resolve_bytes(RIGHT.encode(), "r.yaml").recipe.to_json())
PATHS = list(paths(FULL))[1:]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON), min_size=1, max_size=3))
def test_values_of_the_wrong_kind(edits: list[tuple[tuple[str, ...], Any]]) -> None:
    tree = json.loads(json.dumps(FULL))
    for path, value in edits:
        section = tree
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[path[-1]] = value
    text = json.dumps(tree).replace("-Infinity", "-.inf").replace("Infinity", ".inf")
    check(text.replace("NaN", ".nan").encode())


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.builds(
                lambda path, value: f"{'.'.join(path)}={value}",
                st.sampled_from(PATHS),
                st.one_of(st.sampled_from(NASTY), JSON.map(json.dumps)),
            ),
        ),
        max_size=3,
    )
)
def test_overrides(overrides: list[str]) -> None:
    check(RIGHT.encode(), tuple(overrides))


# typos

Wrap = Callable[[dict[str, Any]], dict[str, Any]]


def places(
    annotation: Any, wrap: Wrap, path: str, above: frozenset[type[Config]] = frozenset()
) -> Iterator[tuple[type[Config], Wrap, str]]:
    """Every section of the schema, with what makes a recipe out of its content."""
    for section in sections(annotation):
        if section in above:
            continue
        named = {"type": type_names(section)[0]} if is_union(annotation) else {}

        def here(content: dict[str, Any], named: dict[str, Any] = named) -> dict[str, Any]:
            return wrap({**named, **content})

        yield section, here, path
        for name, field in section.model_fields.items():

            def deeper(content: Any, name: str = name, here: Wrap = here) -> dict[str, Any]:
                return here({name: content})

            inside = f"{path}.{name}" if path else name
            yield from places(field.annotation, deeper, inside, above | {section})
    held = item(annotation)
    if held is not None and holds_names(annotation):
        yield from places(held, lambda content: wrap({"NAME": content}), f"{path}.NAME", above)
    elif held is not None:
        yield from places(held, lambda content: wrap([content]), f"{path}.0", above)  # type: ignore[arg-type]


def typos(word: str, rng: random.Random) -> Iterator[str]:
    """One of each: a letter left out, doubled, replaced, inserted; two neighbours swapped."""
    letters = "abcdefghijklmnopqrstuvwxyz_"
    i = rng.randrange(len(word))
    yield word[:i] + word[i + 1 :]
    yield word[:i] + word[i] + word[i:]
    yield word[:i] + rng.choice(letters) + word[i + 1 :]
    yield word[:i] + rng.choice(letters) + word[i:]
    i = rng.randrange(len(word) - 1)
    yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def told(tree: dict[str, Any]) -> str:
    try:
        validate(Source("r.yaml", tree))
    except RecipeError as error:
        return error.message
    return ""


def test_a_typo_of_any_key_finds_the_key() -> None:
    rng = random.Random(0)
    missed = []
    count = 0
    for section, wrap, path in places(Recipe, lambda content: content, ""):
        for key in section.model_fields:
            for typo in typos(key, rng):
                if typo in section.model_fields or not typo:
                    continue
                count += 1
                message = told(wrap({typo: 1}))
                where = f"{path}.{typo}" if path else typo
                if f"r.yaml:1:1: {where}: unknown key - did you mean '{key}'?" not in message:
                    missed.append((where, key))
    assert count > 500
    assert len(missed) <= 0.05 * count, missed


@pytest.mark.parametrize(
    ("left", "right", "value"),
    [
        ("", "", 0),
        ("", "ab", 2),
        ("lr", "rl", 1),
        ("pattern", "patern", 1),
        ("kitten", "sitting", 3),
    ],
)
def test_distance(left: str, right: str, value: int) -> None:
    assert distance(left, right) == distance(right, left) == value


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("zzz", ["lr", "steps"]) is None
    assert nearest("x" * 10_000, ["lr"]) is None
    assert nearest("anything", []) is None
    assert nearest("warmup", ["warmup_steps"], loosely=False) is None
    assert nearest("warmup", ["warmup_steps"]) == "warmup_steps"
