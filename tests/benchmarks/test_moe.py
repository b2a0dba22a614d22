"""The study of balance: its arms load, one of them is trained, and tables are made of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import moe
from valkyrie_core.nn.moe.layer import MoEConfig


@pytest.mark.parametrize("arm", moe.ARMS)
def test_every_arm_is_what_it_says(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "SPEED", tmp_path / "speed.json")
    speed = {one: 3.0 if moe.ARMS[one].dense else 6.0 for one in moe.ARMS}
    moe.SPEED.write_text(json.dumps({"milliseconds": speed}))
    recipe = moe.STUDY.recipe_of(arm, 1, tmp_path)
    assert recipe.seed == 1
    # where a dense step takes half the time there are twice as many
    assert recipe.train.steps == (4000 if moe.ARMS[arm].seconds_of else 2000)
    ffns = [block.ffn for block in recipe.model.core.blocks.values()]
    assert all(isinstance(ffn, MoEConfig) != moe.ARMS[arm].dense for ffn in ffns)
    if arm == "groups":
        assert all(isinstance(f, MoEConfig) and f.groups is not None for f in ffns)


@pytest.mark.slow
def test_a_short_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "SPEED", tmp_path / "speed.json")
    short = ["train.steps=3", "train.eval_tokens=256", "train.sample_prompts=[]"]
    study = moe.STUDY._replace(
        results=tmp_path, overrides=lambda arm: [*moe.STUDY.overrides(arm), *short]
    )
    for arm, seed in (("none", 0), ("none", 1), ("bias", 0), ("bias", 1), ("dense", 0)):
        study.run_one(arm, seed, tmp_path / "runs")
    found = study.found()
    monkeypatch.setattr(moe, "ROUNDS", 1)
    moe._measure_speed(study, tmp_path / "runs")
    speed = moe._step_ms()
    assert set(speed) == set(moe.ARMS)
    assert speed["none"] > speed["dense"] == speed["dense_seconds"]
    table = moe.balance_table(found, speed)
    assert table.count("\n| ") >= 3
    assert "| no balance | 2 |" in table
    assert "against no balance, paired by seed: bias" in table
    assert "against bias, loss-free, paired by seed" not in table  # one seed of a dense model
    assert "nan" not in table
