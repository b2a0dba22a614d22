"""Removing an expert: never chosen, nothing else touched, and worth what the losses say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.experts.test_observe import some_text
from tests.nn.menu import MLP, MOES, awake, model_config
from valkyrie_core.errors import DivergedError
from valkyrie_core.experts import measures
from valkyrie_core.experts.knockout import (
    closes_group,
    knock_out,
    obstacle,
    window_losses,
    without,
)
from valkyrie_core.experts.observe import moe_layers, observe
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.moe.layer import MoEConfig


def bits(model: HybridLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize("ffn", MOES)
def test_no_gate_ever_picks_what_is_removed(ffn: str) -> None:
    model = awake(model_config("rwkv7", ffn))
    texts = [some_text()]
    before = observe(model, texts)
    for index, moe in moe_layers(model).items():
        assert obstacle(moe.config) is None
        for expert in range(moe.config.num_experts):
            with without(moe, expert):
                trace = observe(model, texts)
                assert np.isfinite(window_losses(model, texts)).all()
            chosen_RK = trace.layers[index].experts_RK
            assert (chosen_RK != expert).all()
            if "top-p" not in ffn and "exchange" not in ffn and "transformer-chain" not in ffn:
                # others fill in
                assert (chosen_RK >= 0).all()
    after = observe(model, texts)
    for index, layer in before.layers.items():
        assert (layer.experts_RK == after.layers[index].experts_RK).all()


@pytest.mark.parametrize("ffn", ["moe", "moe-top-p", "moe-sigmoid", "moe-chain", "moe-transformer"])
def test_who_is_never_chosen_changes_nothing_at_all(ffn: str) -> None:
    model = awake(model_config("rwkv7", ffn))
    moe = moe_layers(model)[1]
    for router in moe.routers:
        # as dead as can be, but not forbidden
        router.bias_E[2] = -1e6
    texts = [some_text("a"), some_text("b", seed=5)]
    assert (observe(model, texts).layers[1].experts_RK != 2).all()
    found = knock_out(model, texts)
    assert (found.change_EW[1][2] == 0).all()
    assert np.abs(found.change_EW[1][0]).max() > 1e-6


@pytest.mark.parametrize("ffn", MOES)
def test_the_model_is_the_same_afterwards(ffn: str) -> None:
    model = awake(model_config("attention", ffn))
    before = bits(model)
    moe = next(iter(moe_layers(model).values()))
    with without(moe, 1):
        assert not same(bits(model), before)
    assert same(bits(model), before)
    with pytest.raises(RuntimeError), without(moe, 1):
        raise RuntimeError
    assert same(bits(model), before)
    knock_out(model, [some_text()])
    assert same(bits(model), before)
    # one in the other
    with without(moe, 0):
        with without(moe, 1):
            pass
        assert moe.routers[0].bias_E[0] == -torch.inf
        assert moe.routers[0].bias_E[1] != -torch.inf
    assert same(bits(model), before)


def test_a_broken_model_is_told_and_left_as_it_was() -> None:
    model = awake(model_config("attention", "moe"))
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = bits(model)
    with pytest.raises(DivergedError, match="not finite"):
        knock_out(model, [some_text()])
    assert all(
        torch.equal(tensor.isnan(), before[name].isnan()) for name, tensor in bits(model).items()
    )
    assert moe_layers(model)[0].routers[0].bias_E.isfinite().all()


def test_changes_are_those_of_the_losses() -> None:
    model = awake(model_config("attention", "moe"))
    texts = [some_text("a"), some_text("b", windows=3, seed=1)]
    found = knock_out(model, texts)
    assert found.domain_W.tolist() == [0] * 6 + [1] * 3
    assert found.tokens_W.tolist() == [int((x != IGNORED).sum()) for t in texts for x in t[2]]

    def losses() -> list[float]:
        sums = []
        for text in texts:
            for row in range(len(text.tokens_WT)):
                tokens, targets, docs = (x[row : row + 1] for x in text[1:])
                with torch.no_grad():
                    nats, _ = model.token_losses(tokens, targets, model.init_state(1), docs)
                sums.append(float(nats.sum()))
        return sums

    before = losses()
    with without(moe_layers(model)[1], 3):
        removed = losses()
    expected = [x - y for x, y in zip(removed, before, strict=True)]
    assert found.change_EW[1][3] == pytest.approx(expected, abs=1e-9)
    assert set(found.change_EW) == {0, 1}


def test_the_only_useful_expert_is_the_costliest() -> None:
    model = awake(model_config("attention", "moe-switch", layers=2))
    moe = moe_layers(model)[1]
    with torch.no_grad():
        for expert in range(3):
            if expert != 1:
                moe.experts.down_EDH[expert] = 0
        # all tokens go there, and the head listens
        moe.routers[0].bias_E[1] = 10
    texts = [some_text(windows=8)]
    found = knock_out(model, texts)
    change = found.change_EW[1].sum(1)
    assert change[0] == change[2] == 0
    assert change[1] != 0
    assert measures.gini([0, abs(change[1]), 0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("config", "can", "closes"),
    [
        ({"num_experts": 4, "gate": {"type": "softmax_topk", "top_k": 3}}, True, False),
        ({"num_experts": 4, "gate": {"type": "softmax_topk", "top_k": 4}}, False, False),
        ({"num_experts": 4, "gate": {"type": "top_p", "max_experts": 4}}, True, False),
        # a token meets both of its group; without one of them the group is closed
        ({"num_experts": 4, "groups": {"num_groups": 2}}, True, True),
        # and here all of its three: nobody fills in
        (
            {
                "num_experts": 6,
                "gate": {"type": "softmax_topk", "top_k": 3},
                "groups": {"num_groups": 2},
            },
            False,
            False,
        ),
        (
            {
                "num_experts": 6,
                "gate": {"type": "softmax_topk", "top_k": 2},
                "groups": {"num_groups": 2},
            },
            True,
            False,
        ),
        ({"num_experts": 4, "groups": {"num_groups": 2, "top_groups": 2}}, True, False),
        (
            {
                "num_experts": 2,
                "gate": {"type": "softmax_topk", "top_k": 4},
                "exchange": {"type": "chain"},
            },
            False,
            False,
        ),
    ],
)
def test_where_nobody_can_fill_in(config: dict[str, Any], can: bool, closes: bool) -> None:
    described = MoEConfig.model_validate({"type": "moe", "expert": MLP, **config})
    assert (obstacle(described) is None) == can
    assert closes_group(described) == closes
    model = awake(model_config("attention", "moe", layers=1))
    torch.manual_seed(0)
    moe = described.build(16, layer_idx=0, num_layers=1)
    model.core.layers[0].ffn = moe.double().eval()
    trace = None
    for expert in range(described.num_experts):
        with without(moe, expert):
            trace = observe(model, [some_text()])
        if can:
            assert (trace.layers[0].experts_RK != expert).all()
    found = knock_out(model, [some_text()])
    assert set(found.change_EW) == ({0} if can else set())
