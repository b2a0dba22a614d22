from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.data.helpers import write_stories
from valkyrie_core.data.tokenizer import load_tokenizer

RECIPE = """\
name: stories
data:
  corpora:
    stories: {{type: files, paths: ['{folder}'], holdout: {{type: fraction, fraction: 0.3}}}}
  tokenizer: {{type: sentencepiece, vocab_size: 300}}
model:
  dim: 32
  head: tied
  core:
    type: stack
    blocks:
      attn: {{mixer: {{type: attention, num_heads: 2}}, ffn: {{type: swiglu}}}}
    pattern: [attn]
train: {{type: supervised, steps: 2, batch_size: 2, context_len: 32}}
"""


@pytest.fixture
def recipe(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    folder = write_stories(tmp_path / "texts", 20)
    (tmp_path / "stories.yaml").write_text(RECIPE.format(folder=folder))
    return "stories.yaml"


def test_build_writes_a_tokenizer(cli: Cli, recipe: str) -> None:
    outcome = cli("tokenizer", "build", recipe)
    assert outcome.code == 0, outcome.err
    assert "sentencepiece, 300 tokens" in outcome.out
    assert load_tokenizer(Path("tokenizers/stories")).vocab_size == 300
    report = cli("tokenizer", "build", recipe, "--out", "other", "--json").json
    assert report["schema"] == "valkyrie.tokenizer.build/1"
    assert report["directory"] == "other"
    assert report["fingerprint"] == load_tokenizer(Path("tokenizers/stories")).fingerprint
    assert 0 < report["documents"] < 20


def test_what_was_built_serves_other_recipes(cli: Cli, recipe: str) -> None:
    built = cli("tokenizer", "build", recipe, "--json").json
    values = "{type: file, path: tokenizers/stories/tokenizer.model, vocab_size: 300}"
    outcome = cli("tokenizer", "eval", recipe, "--set", f"data.tokenizer={values}", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["fingerprint"] == built["fingerprint"]


def test_eval_says_what_it_does_and_costs(cli: Cli, recipe: str) -> None:
    report = cli("tokenizer", "eval", recipe, "--json").json
    assert report["schema"] == "valkyrie.tokenizer.eval/1"
    assert report["exact"] is True
    assert report["embedding_parameters"] == 300 * 32
    assert 0 < report["parameters_share"] < 1
    score = report["corpora"]["stories"]
    assert score["documents"] == score["round_trips"] == 20
    assert score["bytes_per_token"] == pytest.approx(score["bytes"] / score["tokens"])
    low, high = sorted([score["train_bytes_per_token"], score["validation_bytes_per_token"]])
    assert low <= score["bytes_per_token"] <= high
    outcome = cli("tokenizer", "eval", recipe)
    assert outcome.code == 0
    assert "20/20" in outcome.out
    assert f"{len(report['hostile'])}/{len(report['hostile'])}" in outcome.out
    assert "9.6k parameters" in outcome.out


def test_a_vocabulary_too_large_is_a_wrong_recipe(cli: Cli, recipe: str) -> None:
    outcome = cli("tokenizer", "build", recipe, "--set", "data.tokenizer.vocab_size=9999", "--json")
    assert outcome.code == 3
    assert "is too large for this text" in outcome.json["error"]["message"]
    assert "set data.tokenizer.vocab_size to at most" in outcome.json["error"]["hint"]


def test_missing_text_has_its_own_exit_code(cli: Cli, recipe: str) -> None:
    outcome = cli("tokenizer", "eval", recipe, "--set", "data.corpora.stories.paths=[nowhere]")
    assert outcome.code == 4
    assert "nowhere: no such file or folder" in outcome.err


@pytest.mark.parametrize("command", [(), ("build",), ("eval",)])
def test_help_has_examples(cli: Cli, command: tuple[str, ...]) -> None:
    outcome = cli("tokenizer", *command, "--help")
    assert outcome.code == 0
    assert "Examples:" in outcome.out
    assert "valkyrie tokenizer" in outcome.out
