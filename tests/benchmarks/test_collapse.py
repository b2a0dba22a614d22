"""The study of forced collapse: the hold holds and lets go, arms load, and its table is right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import collapse
from valkyrie_core.nn.moe.layer import MoE, MoEConfig
from valkyrie_core.nn.state import Ctx


@pytest.mark.parametrize("arm", collapse.ARMS)
def test_every_arm_is_what_it_says(arm: str, tmp_path: Path) -> None:
    recipe = collapse.STUDY.recipe_of(arm, 2, tmp_path)
    assert recipe.seed == 2
    for block in recipe.model.core.blocks.values():
        assert isinstance(block.ffn, MoEConfig)
        assert (block.ffn.revive is not None) == collapse.ARMS[arm].revive
        assert [one.type for one in block.ffn.balance] == [arm.split("_")[0]] * ("none" not in arm)


def test_a_hold_ends() -> None:
    config = MoEConfig.model_validate({"num_experts": 8, "revive": {}})
    layer = config.build(16, layer_idx=0, num_layers=1)
    assert isinstance(layer, MoE)
    x_BTD = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    pos_BT = torch.arange(50).expand(2, -1)
    ctx = Ctx(pos_BT=pos_BT, segment_BT=torch.zeros_like(pos_BT))
    loads, losses = [], []
    with collapse.Hold(2).everywhere():
        for step in range(4):
            layer.each_router[0].bias_E[3] = 50.0
            if step < 3:
                layer.starved_E += 1
            after = layer(x_BTD, (), ctx)[2]
            loads.append(after.routed[0].load_E)
            losses.append([float(loss.detach()) for name, loss in after.aux if name == "hold"])
    # a quarter of eight experts' share is theirs, about
    assert [len(one) for one in losses] == [1, 1, 0, 0]
    assert losses[0][0] == pytest.approx(math.log(4), rel=0.3)
    assert [int((load > 0).sum()) for load in loads[:2]] == [collapse.FAVOURED] * 2
    assert int((loads[2] > 0).sum()) > collapse.FAVOURED
    # from then on biases are what training makes of them
    assert float(loads[2][3]) < 100 == float(loads[3][3])
    assert layer.starved_E.tolist() == [0] * 8


def test_recovery_has_to_last() -> None:
    dead = dict.fromkeys(range(5, 400, 5), 0.8)
    assert collapse.recovered_after(dead) is None
    dead[340] = 0.0
    assert collapse.recovered_after(dead) is None
    dead |= dict.fromkeys(range(360, 385, 5), 0.04)
    assert collapse.recovered_after(dead) == 60
    # what happened before the release does not count
    assert collapse.recovered_after(dict.fromkeys(range(5, 305, 5), 0.0)) is None


@pytest.mark.slow
def test_a_short_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse, "HELD", 5)
    monkeypatch.setattr(collapse, "AFTER", 5)
    short = ["train.eval_tokens=256", "train.sample_prompts=[]"]
    study = collapse.STUDY._replace(
        results=tmp_path, overrides=lambda arm: [*collapse.STUDY.overrides(arm), *short]
    )
    for arm in ("none", "bias_revive"):
        study.run_one(arm, 0, tmp_path / "runs")
    found = study.found()
    # two of sixteen are left
    assert [one["dead"]["5"] for one in found] == [0.875, 0.875]
    table = collapse.collapse_table(found)
    assert "| no balance | no | never | 88% |" in table
    assert "| bias, loss-free | yes | never | 88% |" in table
