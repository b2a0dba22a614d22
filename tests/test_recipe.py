"""Loading, storing and naming recipes; overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.wrong_recipes import RIGHT
from valkyrie_core.errors import MissingError, RecipeError
from valkyrie_core.recipe import Recipe, Resolved, resolve_bytes


def load(*overrides: str, text: str = RIGHT) -> Recipe:
    return resolve(*overrides, text=text).recipe


def resolve(*overrides: str, text: str = RIGHT) -> Resolved:
    return resolve_bytes(text.encode(), "r.yaml", overrides)


def told(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    return caught.value.message.splitlines()


def test_load_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RIGHT, encoding="utf-8")
    recipe = Recipe.load(path, ["train.steps=7"])
    assert recipe.name == "example"
    assert recipe.train.steps == 7
    assert recipe.model.vocab_size == 512
    assert recipe.model.core.layers == ("rwkv", "rwkv", "attn")
    assert Recipe.load(str(path), {"train.steps": 7}) == recipe


def test_an_integer_is_a_number_but_text_is_not() -> None:
    assert load("train.optimizer.lr=1").train.optimizer.lr == 1.0
    assert told("train.optimizer.lr='1'") == [
        "--set train.optimizer.lr='1': train.optimizer.lr: should be a number "
        "- write 1 without quotes (got '1')"
    ]


def test_save_and_from_json_give_the_same_recipe(tmp_path: Path) -> None:
    recipe = load('description="é😀\\u2028\\t: # \\e[0m"')
    path = tmp_path / "recipe.json"
    recipe.save(path)
    assert Recipe.from_json(path) == recipe
    assert Recipe.load(path) == recipe
    assert json.loads(path.read_text(encoding="utf-8"))["model"]["vocab_size"] == 512
    assert Recipe.from_json(path).fingerprint() == recipe.fingerprint()


def test_a_stored_recipe_with_an_unknown_key_is_told(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    content = json.loads(load().to_json())
    content["train"]["momentum"] = 0.9
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.json:\d+:5: train\.momentum: unknown key"):
        Recipe.from_json(path)
    with pytest.raises(MissingError):
        Recipe.from_json(tmp_path / "none.json")


def test_fingerprint_is_of_the_values() -> None:
    one = load().fingerprint()
    assert len(one) == 64
    assert load(text="# a comment\n" + RIGHT.replace("2e-2", "0.02")).fingerprint() == one
    assert load("train.optimizer.momentum=0.95").fingerprint() == one  # its default
    assert load("seed=2").fingerprint() != one


# overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=5", 5),
        ("train.optimizer.lr=1e-4", 1e-4),
        ("train.optimizer.adamw.betas.1=0.99", (0.9, 0.99)),
        ("model.core.pattern=[rwkv, attn]", ("rwkv", "attn")),
        ("model.core.pattern.0=attn", ("attn", "rwkv", "attn")),
        ("model.core.blocks.attn.ffn.hidden_dim=null", None),
        ("name=a=b", None),
        ('data.corpora."plays".weight=3', 3.0),
        ("train.compile.mode=default", "default"),
        ("data.corpora.plays.holdout.fraction=0.2", 0.2),
    ],
)
def test_an_override_replaces_one_value(override: str, value: Any) -> None:
    if override == "name=a=b":
        assert "should match" in told(override)[0]  # split at the first =
        return
    path = override.partition("=")[0].replace('"', "").split(".")
    found: Any = load(override)
    for part in path:
        if part.isdigit():
            break
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_an_override_changes_nothing_else() -> None:
    # the default of muon's adamw has a learning rate of its own
    before, after = load(), load("train.optimizer.adamw.eps=1e-9")
    assert before.train.optimizer.type == after.train.optimizer.type == "muon"
    changed = after.train.optimizer.adamw.model_copy(update={"eps": 1e-8})
    assert changed == before.train.optimizer.adamw
    assert before.train.optimizer.adamw.lr != type(changed)().lr


def test_the_last_of_two_overrides_counts() -> None:
    assert load("train.steps=5", "train.steps=6").train.steps == 6


def test_another_type_drops_what_the_file_says_about_the_old_one() -> None:
    optimizer = load("train.optimizer.type=adamw").train.optimizer
    assert optimizer == type(optimizer)()
    for order in (1, -1):
        overrides = ["train.optimizer.type=adamw", "train.optimizer.lr=0.5"][::order]
        assert load(*overrides).train.optimizer.lr == 0.5
    same = load("train.optimizer.type=muon").train.optimizer
    assert same.lr == 0.02
    corpus = load("data.corpora.plays.type=hub", "data.corpora.plays.dataset=a/b").data.corpora[
        "plays"
    ]
    assert corpus.type == "hub"
    assert corpus.weight == 1.0


def test_an_override_mends_a_wrong_file() -> None:
    text = RIGHT.replace("steps: 100", "steps: [1]").replace("    type: muon\n", "")
    recipe = load("train.steps=3", "train.optimizer.type=muon", text=text)
    assert recipe.train.steps == 3
    assert recipe.train.optimizer.lr == 0.02
    assert load("seed=3", text=RIGHT.replace("seed: 1", "seed: *x")).seed == 3


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "model.core.patern=[rwkv]",
            "--set model.core.patern=[rwkv]: model.core.patern: unknown key "
            "- did you mean 'pattern'?",
        ),
        (
            "trian.steps=3",
            "--set trian.steps=3: trian: unknown key - did you mean 'train'?",
        ),
        (
            "train.schedule.warmup=3",
            "--set train.schedule.warmup=3: train.schedule.warmup: unknown key "
            "- did you mean 'warmup_steps'?",
        ),
        ("model.dim=x", "--set model.dim=x: model.dim: should be an integer (got 'x')"),
        (
            "train.optimizer.type=adam",
            "--set train.optimizer.type=adam: train.optimizer.type: unknown type 'adam' "
            "- did you mean 'adamw'? (the types are adamw, muon, adafactor)",
        ),
        (
            "model.core.pattern.7=rwkv",
            "--set model.core.pattern.7=rwkv: model.core.pattern is a list of 3 items (0 to 2)",
        ),
        ("model.dim.x=1", "--set model.dim.x=1: model.dim is a value, not a section"),
        ("steps", "--set steps: an override is path=value, such as train.steps=100"),
        ("a..b=1", "--set a..b=1: an override is path=value, such as train.steps=100"),
        ("=1", "--set =1: an override is path=value, such as train.steps=100"),
        ("name=[", "--set name=[: a value is missing here"),
        ("seed=!!int 3", "--set seed=!!int 3: seed: tags such as !!int are not read"),
    ],
)
def test_wrong_overrides_are_told_as_they_were_typed(override: str, line: str) -> None:
    assert told(override) == [line]


def test_mistakes_of_file_and_overrides_are_told_together() -> None:
    with pytest.raises(RecipeError) as caught:
        load("model.dim=x", "a", text=RIGHT.replace("seed:", "sed:"))
    assert [line.split(": ")[0] for line in caught.value.message.splitlines()] == [
        "r.yaml:4:1",
        "--set model.dim=x",
        "--set a",
    ]


def test_values_in_messages_are_safe_and_short() -> None:
    (line,) = told('seed="\\e[31m\\u202e' + "x" * 500 + '"')
    assert line.isprintable()
    assert len(line) < 250


def test_names_of_a_recipe_in_messages_are_safe() -> None:
    text = RIGHT.replace("      attn:", '      "\\e[31mattn":')
    with pytest.raises(RecipeError) as caught:
        load(text=text)
    assert r"no block 'attn' - the blocks are rwkv, \x1b[31mattn" in caught.value.message


def test_memory_tokens_of_a_looped_model_stand_in_the_text() -> None:
    recipe = Recipe.load("tiny/recursive")
    assert recipe.data.memory_tokens == 2
    assert Recipe.load("tiny/rwkv7").data.memory_tokens == 0
    assert Recipe.load("tiny/recursive", ["data.memory_tokens=2"]).data == recipe.data
    with pytest.raises(RecipeError, match="3 is not the model's"):
        Recipe.load("tiny/recursive", ["data.memory_tokens=3"])
    # what is written and read again is the same
    assert Recipe.model_validate_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.core.memory_tokens=9999"], "9999 memory tokens leave no room for text"),
        (
            ["model.core.halting={type: latent, min_loops: 5}", "model.core.loops=2"],
            "5 are more than the 2 loops",
        ),
        (
            ["train.weights=bf16", "train.optimizer={type: adafactor}", "train.ema={}"],
            "an average in bf16 would lose its small updates",
        ),
    ],
)
def test_what_would_be_in_vain_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load("tiny/recursive", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.context_len=64", "64 is not the canvas's 22 cells"),
        (
            "model.core.blocks={attn: {mixer: {type: rwkv7, head_dim: 8}, ffn: {type: swiglu}}}",
            "some block needs attention",
        ),
        ("train.state_passing={}", "a canvas knows no such thing"),
        ("train.compile={}", "a canvas knows no such thing"),
        ("data.corpora.sudoku={type: arithmetic}", "a canvas answers questions alone"),
        (
            "data.corpora.sudoku.task={type: khop, symbols: 3, hops: [1], asked: 2}",
            "one question at a time",
        ),
    ],
)
def test_a_canvas_reads_questions_as_a_whole(override: str, message: str) -> None:
    assert Recipe.load("tiny/canvas").train.context_len == 22
    with pytest.raises(RecipeError, match=message):
        Recipe.load("tiny/canvas", [override])
