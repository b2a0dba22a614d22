"""The YAML 1.2 core schema, limits, and the place of every value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from valkyrie_core.errors import RecipeError
from valkyrie_core.recipe_yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_yaml


def read(text: str | bytes) -> Any:
    source = read_yaml(text if isinstance(text, bytes) else text.encode(), "r.yaml")
    assert not source.problems, [str(problem) for problem in source.problems]
    return source.tree


def told(text: str | bytes) -> str:
    try:
        source = read_yaml(text if isinstance(text, bytes) else text.encode(), "r.yaml")
    except RecipeError as error:
        return error.message
    assert source.problems
    return "\n".join(map(str, source.problems))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # what YAML 1.1 reads otherwise
        ("3:1", "3:1"),
        ("190:20:30", "190:20:30"),
        ("1e-4", 1e-4),
        ("1e4", 1e4),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("012", 12),
        ("0o14", 12),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("2026-08-01", "2026-08-01"),
        ("=", "="),
        # the rest of the core schema
        ("true", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("", None),
        ("-7", -7),
        ("+12", 12),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5E+3", -1500.0),
        ("-.inf", -math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("1e", "1e"),
        (".", "."),
        ("-", [None]),
        ("'3'", "3"),
        ('"on"', "on"),
        ("|\n  3", "3\n"),
        ('"\\u00e9\\ud83d\\ude00"', "é😀"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    document = f"key:\n{text}\n" if text == "-" else f"key: {text}\n"
    result = read(document)["key"]
    assert result == value
    assert type(result) is type(value)


def test_not_a_number_is_read() -> None:
    assert math.isnan(read("key: .nan")["key"])


def test_places_of_keys_and_values() -> None:
    source = read_yaml(b"# a comment\nmodel:\n  dim: 64\n  list: [1, {b: 2}]\n", "r.yaml")
    assert str(source.keys[("model", "dim")]) == "r.yaml:3:3"
    assert str(source.values[("model", "dim")]) == "r.yaml:3:8"
    assert str(source.values[("model", "list", 1, "b")]) == "r.yaml:4:17"
    assert str(source.at_value(("model", "core", "pattern"))) == "r.yaml:2:1"


def test_lines_are_those_of_an_editor() -> None:
    # YAML 1.1 also breaks lines at U+0085 and U+2028
    assert told("a: 1\r\nb: 2\rc: 'x\u2028y'\n").startswith("r.yaml:3:6: the character U+2028")
    assert read('a: "\\u2028"\n')["a"] == "\u2028"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a: 1\na: 2\n", "r.yaml:2:1: a: this key is given twice (first on line 1)"),
        ("a: {b: 1, b: 2}\n", "r.yaml:1:11: a.b: this key is given twice (first on line 1)"),
        ("a: !!str 1\n", "r.yaml:1:4: a: tags such as !!str"),
        ("a: !local 1\n", "r.yaml:1:4: a: tags such as !local"),
        ("? [a]\n: 1\n", "r.yaml:1:3: a key must be a name"),
        ("null: 1\n", "r.yaml:1:1: null: a key must be text"),
        ('a: "\\ud800"\n', "r.yaml:1:4: a: an escape is half of a character"),
        ('a: "\\UFFFFFFFF"\n', "r.yaml:1:7: an escape names a character"),
        ("%YAML 1.1\n---\na: 1\n", "r.yaml:1:1: recipes are YAML 1.2"),
        ("a: [\n", "r.yaml:2:1: a value is missing here"),
        (b"a: \xff\n", "r.yaml:1:4: byte 0xff is not UTF-8"),
        (b"a: \x00\n", "r.yaml:1:4: the character U+0000"),
    ],
)
def test_refused(text: str | bytes, start: str) -> None:
    assert told(text).startswith(start)


def test_all_repeated_keys_are_told() -> None:
    assert told("a: 1\na: {x: 1, x: 2}\nb: 1\nb: 2\n").count("given twice") == 3


def test_the_first_of_repeated_keys_stays() -> None:
    assert read_yaml(b"a: 1\na: 2\n", "r.yaml").tree == {"a": 1}


def test_limits() -> None:
    assert told(b"#" * (MAX_BYTES + 1)) == "r.yaml:1:1: larger than 1 MiB"
    assert "nested more than 40 deep" in told("a: " + "[" * (MAX_DEPTH + 1))
    assert "nested more than 40 deep" in told("{a: " * 100_000)
    read("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    assert "more than 10000 values" in told("a: [" + "1," * MAX_NODES + "]")
    read("a: [" + "1," * (MAX_NODES - 2) + "]")
