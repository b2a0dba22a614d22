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
    monkeypatch.setattr(moe, "FOLDER", tmp_path)
    speed = {one: 3.0 if moe.ARMS[one].dense else 6.0 for one in moe.ARMS}
    (tmp_path / moe.SPEED).write_text(json.dumps({"milliseconds": speed}))
    recipe = moe.arm_recipe(arm, 1, tmp_path)
    assert recipe.seed == 1
    # where a dense step takes half the time there are twice as many
    assert recipe.train.steps == (4000 if moe.ARMS[arm].seconds_of else 2000)
    ffns = [block.ffn for block in recipe.model.core.blocks.values()]
    assert all(isinstance(ffn, MoEConfig) != moe.ARMS[arm].dense for ffn in ffns)
    if arm == "groups":
        assert all(isinstance(f, MoEConfig) and f.groups is not None for f in ffns)


@pytest.mark.slow
def test_a_short_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "FOLDER", tmp_path / "results")
    whole = moe.arm_recipe

    def short(arm: str, seed: int, runs_dir: Path) -> moe.Recipe:
        recipe = whole(arm, seed, runs_dir)
        changes = {"steps": 3, "eval_tokens": 256, "sample_prompts": ()}
        return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})

    monkeypatch.setattr(moe, "arm_recipe", short)
    for arm, seed in (("none", 0), ("none", 1), ("bias", 0), ("bias", 1), ("dense", 0)):
        moe._train(arm, seed, tmp_path / "runs")
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").iterdir())]
    monkeypatch.setattr(moe, "ROUNDS", 1)
    moe._measure_speed(tmp_path / "runs")
    speed = moe._step_ms()
    assert set(speed) == set(moe.ARMS)
    assert speed["none"] > speed["dense"] == speed["dense_seconds"]
    table = moe.balance_table(found, speed)
    assert table.count("\n| ") >= 3
    assert "| no balance | 2 |" in table
    assert "against no balance, paired by seed: bias" in table
    assert "against bias, loss-free, paired by seed" not in table  # one seed of a dense model
    assert "nan" not in table
