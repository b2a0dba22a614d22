"""Every tiny recipe trains two steps, stops, resumes to the same bits, evaluates and generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from valkyrie_core import Recipe, runs
from valkyrie_core.data.corpus import Corpus
from valkyrie_core.data.tokenizer import TokenizerConfig
from valkyrie_core.nn.block import ChannelMixer, TokenMixer
from valkyrie_core.train.optim import Optimizer
from valkyrie_core.train.schedule import Schedule

TINY = sorted((Path(__file__).parent.parent / "recipes" / "tiny").glob("*.yaml"))


def shortened(path: Path, runs_dir: Path, steps: int) -> Recipe:
    overrides = [
        f"train.steps={steps}",
        f"runs_dir={runs_dir}",
        "train.eval_tokens=256",
        "train.log_every=1",
    ]
    return Recipe.load(path, overrides)


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_two_steps_and_resume(path: Path, tmp_path: Path) -> None:
    whole = runs.train(shortened(path, tmp_path / "whole", 2))
    assert whole.steps == 2
    assert whole.train_loss is not None
    assert whole.val_bpb is not None
    assert 0 < whole.val_bpb < 40
    recipe = shortened(path, tmp_path / "parts", 2)
    runs.train(recipe.model_copy(), steps=2)
    _cut_back(tmp_path / "parts" / recipe.name, keep=0)
    runs.train(recipe, resume=True, steps=1)
    runs.train(recipe, resume=True)
    ends = [runs.load(tmp_path / kind / recipe.name).model for kind in ("whole", "parts")]
    first, second = (dict(model.named_parameters()) for model in ends)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def _cut_back(run: Path, keep: int) -> None:
    """Throws away the checkpoints after a step, as if the process had been killed there."""
    import shutil

    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.split("-")[1]) > keep:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_evaluate_and_generate(path: Path, tmp_path: Path) -> None:
    recipe = shortened(path, tmp_path, 1)
    runs.train(recipe)
    report = runs.evaluate(tmp_path / recipe.name)
    assert set(report.corpora) == set(recipe.data.corpora)
    for corpus in report.corpora.values():
        assert 0 < corpus.bpb < 40
        assert corpus.tokens > 0
    # a canvas answers as a whole
    limit = None if recipe.model.core.type == "canvas" else 5
    generated = runs.generate(tmp_path / recipe.name, prompt="The ", max_tokens=limit)
    assert generated.tokens <= (limit or recipe.train.context_len)
    rows = (tmp_path / recipe.name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows]


def test_tiny_recipes_cover_every_type() -> None:
    def types(union: object) -> set[str]:
        return {c.model_fields["type"].default for c in get_args(get_args(union)[0])}

    recipes = [Recipe.load(path) for path in TINY]
    blocks = [block for r in recipes for block in r.model.core.blocks.values()]
    assert {b.mixer.type for b in blocks} == types(TokenMixer)
    assert {b.ffn.type for b in blocks} == types(ChannelMixer)
    assert {r.train.optimizer.type for r in recipes} == types(Optimizer)
    assert {r.train.schedule.type for r in recipes} == types(Schedule)
    # a tiny recipe needs nothing that is not there: no wheel, no hub, no file of the user's
    offline = {c.type for r in recipes for c in r.data.corpora.values()}
    assert offline == {"python", "questions"}
    assert offline < types(Corpus)
    built = {r.data.tokenizer.type for r in recipes}
    assert built == types(TokenizerConfig) - {"file"}
