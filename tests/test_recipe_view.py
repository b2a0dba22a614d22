"""What `recipe show`, `diff` and `schema` print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.wrong_recipes import CASES, RIGHT
from valkyrie_core.recipe import Recipe, Resolved, resolve_bytes
from valkyrie_core.recipe_view import ValueRow, diff_recipes, json_schema, to_yaml, value_rows
from valkyrie_core.recipe_yaml import read_yaml


def resolve(*overrides: str) -> Resolved:
    return resolve_bytes(RIGHT.encode(), "r.yaml", overrides)


def rows_of(*overrides: str) -> dict[str, ValueRow]:
    return {row.path: row for row in value_rows(resolve(*overrides))}


def test_every_value_has_its_origin() -> None:
    rows = rows_of(
        "train.optimizer.adamw.eps=1e-9", "model.core.pattern.0=attn", "train.compile={}"
    )
    origins = {path: row.origin for path, row in rows.items()}
    assert origins["model.dim"] == "r.yaml:16"
    assert origins["data.corpora.python.holdout.fraction"] == "r.yaml:11"
    assert origins["model.vocab_size"] == "derived"
    assert origins["train.optimizer.momentum"] == "default"
    assert origins["train.optimizer.adamw.eps"] == "--set"
    assert origins["train.optimizer.adamw.lr"] == "default"
    assert origins["model.core.pattern"] == "--set"
    assert origins["train.compile.mode"] == "default"
    assert rows["train.steps"].help == "Optimizer steps; the horizon of the schedule."
    assert rows["train.optimizer.type"].help.startswith("Muon for hidden matrices")
    assert all(row.help for row in rows.values())


def test_only_the_vocabulary_is_derived() -> None:
    assert [p for p, row in rows_of().items() if row.origin == "derived"] == ["model.vocab_size"]


@pytest.mark.parametrize("with_help", [False, True])
def test_what_is_shown_is_the_same_recipe(with_help: bool) -> None:
    for text in [
        "plain",
        "on",
        "0o14",
        "3:1",
        "a # b",
        'q"\\',
        "é😀",
        "",
        "\u2028\x1b",
        "- x",
        "1e4",
    ]:
        resolved = resolve(f"description={json.dumps(text)}", f"train.init_from={json.dumps(text)}")
        shown = to_yaml(value_rows(resolved), with_help=with_help)
        assert resolve_bytes(shown.encode(), "shown.yaml").recipe == resolved.recipe


def test_diff_tells_what_differs() -> None:
    assert diff_recipes(resolve(), resolve("train.optimizer.momentum=0.95")) == []
    rows = diff_recipes(resolve(), resolve("train.schedule.type=cosine", "model.dim=128"))
    told = {row.path: (row.left, row.right, row.side) for row in rows}
    assert told == {
        "model.dim": (64, 128, "both"),
        "train.schedule.type": ("wsd", "cosine", "both"),
        "train.schedule.warmup_steps": (10, 20, "both"),
        "train.schedule.decay_fraction": (0.2, None, "left"),
    }


# the JSON Schema


def walk(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for item in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(item, dict | list):
            yield from walk(item)


def test_schema_carries_every_docstring() -> None:
    schema = json_schema()
    definitions = schema["$defs"]
    assert schema["properties"]["seed"]["description"].startswith("Fixes initial weights")
    for name, definition in {**definitions, "Recipe": schema}.items():
        assert definition["description"], name
        assert definition["additionalProperties"] is False, name
        for key, property_ in definition["properties"].items():
            assert key == "type" or property_["description"], f"{name}.{key}"


def test_schema_has_no_dangling_reference() -> None:
    schema = json_schema()
    references = [part["$ref"] for part in walk(schema) if isinstance(part.get("$ref"), str)]
    assert references
    for reference in references:
        assert reference.removeprefix("#/$defs/") in schema["$defs"]


def accepts(schema: dict[str, Any], value: Any) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    return bool(validator(schema).is_valid(value))


def test_schema_accepts_what_loads() -> None:
    schema = json_schema()
    assert accepts(schema, read_yaml(RIGHT.encode(), "r.yaml").tree)
    assert accepts(schema, json.loads(resolve().recipe.to_json()))


WRONG_FOR_EDITORS = [
    "misspelt key",
    "misspelt section",
    "key of another type",
    "missing key",
    "missing type",
    "misspelt `type`",
    "unknown type",
    "quoted number",
    "zero",
    "out of range",
    "wrong choice",
    "name of a run with a slash",
    "too many items",
]


@pytest.mark.parametrize("name", WRONG_FOR_EDITORS)
def test_schema_refuses_what_does_not_load(name: str) -> None:
    old, new = next((old, new) for case, old, new in CASES if case == name)
    assert isinstance(new, str)
    tree = read_yaml(RIGHT.replace(old, new, 1).encode(), "r.yaml").tree
    assert not accepts(json_schema(), tree)


def test_schema_is_of_the_recipe() -> None:
    assert set(json_schema()["properties"]) == set(Recipe.model_fields)
