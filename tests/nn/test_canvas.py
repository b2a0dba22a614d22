"""The answer canvas: two latents by one network, its readout, its halting head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.nn.menu import MOES, RWKV
from valkyrie_core.config import MisfitError
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.canvas import EMPTY, HALT, Canvas
from valkyrie_core.nn.canvas_core import Carry
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.models import build_model
from valkyrie_core.plan.counter import FORMULAS

VOCAB, CELLS = 19, 7
BLOCKS: dict[str, dict[str, Any]] = {
    "attn": {"mixer": {"type": "attention", "num_heads": 2}, "ffn": {"type": "swiglu"}},
    "nope": {
        "mixer": {
            "type": "attention",
            "num_heads": 4,
            "num_kv_heads": 2,
            "position": {"type": "none"},
        },
        "ffn": {"type": "channel_mix"},
    },
    "rwkv": {"mixer": RWKV, "ffn": {"type": "swiglu"}},
    "sparse": {
        "mixer": {"type": "attention", "num_heads": 2, "normalizer": "sparsemax"},
        "ffn": {"type": "swiglu", "hidden_dim": 24},
    },
    "moe": {"mixer": {"type": "attention", "num_heads": 2}, "ffn": MOES["moe"]},
}
CANVASES: dict[str, dict[str, Any]] = {
    "plain": {"pattern": ["attn"]},
    "two layers": {"pattern": ["attn", "nope"], "memory_tokens": 0},
    "recurrent": {"pattern": ["rwkv", "attn"], "h_cycles": 2, "l_cycles": 1},
    "experts": {"pattern": ["moe"], "memory_tokens": 1, "normalizer": "softmax"},
    "sparse": {"pattern": ["sparse"]},
    "q_learning": {"pattern": ["attn"], "halting": {"type": "q_learning"}},
}


def canvas(*, seed: int = 0, **core: Any) -> Canvas:
    """A canvas whose every weight matters: as drawn, the output matrices are zero."""
    settings = {"cells": CELLS, "h_cycles": 2, "l_cycles": 2, "memory_tokens": 3, **core}
    blocks = {name: BLOCKS[name] for name in settings["pattern"]}
    tree = {
        "vocab_size": VOCAB,
        "dim": 16,
        "core": {"type": "canvas", "blocks": blocks, **settings},
    }
    torch.manual_seed(seed)
    model = build_model(ModelConfig.model_validate(tree))
    assert isinstance(model, Canvas)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def questions(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens_BC = torch.randint(1, VOCAB, (count, CELLS), generator=generator)
    targets_BC = torch.randint(1, VOCAB, (count, CELLS), generator=generator)
    for row in range(count):
        tokens_BC[row, CELLS - row % 3 :] = EMPTY
        targets_BC[row, 2 + row % 4 :] = IGNORED
    return tokens_BC, targets_BC


def naive(model: Canvas, tokens_BC: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
    """One step from the paper's formula: the blocks called one by one, nothing shared or saved."""
    from valkyrie_core.nn.state import Ctx

    core = model.core
    x_BCD = model.embedding_norm(model.embedding(tokens_BC) + model.place.weight)
    memory = model.memory_MD.expand(len(tokens_BC), *model.memory_MD.shape)
    x_BMD = torch.cat([memory, x_BCD], 1)
    pos = torch.arange(x_BMD.shape[1]).expand(x_BMD.shape[:2])

    def f(u: Tensor) -> Tensor:
        ctx = Ctx(pos, torch.zeros_like(pos), causal=False)
        for layer in core.layers:
            state = layer.init_state(len(u), device=u.device, dtype=u.dtype)
            u, _, ctx = layer(u, state, ctx)
        return core.out_norm(u)

    z_H, z_L = carry
    for _ in range(core.config.h_cycles):
        for _ in range(core.config.l_cycles):
            z_L = f(z_L + z_H + x_BMD)
        z_H = f(z_H + z_L)
    h = model.head_norm(z_H)
    return model.head(h[:, len(model.memory_MD) :]), model.q_head(h[:, 0]), Carry(z_H, z_L)


@pytest.mark.parametrize("name", CANVASES)
def test_a_step_is_the_formula(name: str) -> None:
    model = canvas(**CANVASES[name])
    tokens_BC, _ = questions(5)
    carry = model.begin(5)
    for _ in range(2):
        expected = naive(model, tokens_BC, carry)
        out = model(tokens_BC, carry)
        torch.testing.assert_close(out.logits_BCV, expected[0])
        torch.testing.assert_close(out.q_BQ, expected[1])
        torch.testing.assert_close(out.carry, expected[2])
        carry = out.carry


@pytest.mark.parametrize("name", CANVASES)
def test_batch_mates_change_nothing(name: str) -> None:
    model = canvas(**CANVASES[name])
    tokens_BC, _ = questions(4)
    *_, together = model.steps(tokens_BC, 2)
    for row in range(4):
        *_, alone = model.steps(tokens_BC[row : row + 1], 2)
        torch.testing.assert_close(alone.logits_BCV[0], together.logits_BCV[row])
        torch.testing.assert_close(alone.q_BQ[0], together.q_BQ[row])


@pytest.mark.parametrize("name", CANVASES)
def test_a_carry_is_a_value(name: str) -> None:
    model = canvas(**CANVASES[name])
    tokens_BC, _ = questions(3)
    first = model(tokens_BC, model.begin(3))
    second = model(tokens_BC, first.carry)
    model(questions(3, seed=9)[0], first.carry)
    torch.testing.assert_close(model(tokens_BC, first.carry).logits_BCV, second.logits_BCV)
    assert not torch.equal(first.logits_BCV, second.logits_BCV)


def test_every_cell_sees_all_cells() -> None:
    """A canvas is not causal, and says so."""
    model = canvas(pattern=["attn"])
    tokens_BC, _ = questions(1)
    changed_BC = tokens_BC.clone()
    changed_BC[0, -1] = tokens_BC[0, -1] % (VOCAB - 1) + 1
    before, after = (next(iter(model.steps(t))).logits_BCV for t in (tokens_BC, changed_BC))
    assert ((before - after).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize(("cycles", "expected"), [(0, 2), (1, 3), (2, 6)])
def test_gradients_go_through_the_last_turns_alone(cycles: int, expected: int) -> None:
    model = canvas(pattern=["attn"], gradient_cycles=cycles)
    with_gradient = []

    def seen(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        with_gradient.append(torch.is_grad_enabled())

    model.core.layers[0].register_forward_pre_hook(seen)
    tokens_BC, targets_BC = questions(2)
    first = model(tokens_BC, model.begin(2))
    assert not first.carry.z_H_BMD.requires_grad
    assert with_gradient == [False] * (6 - expected) + [True] * expected
    assert model.core.trained_passes == expected
    model.loss(tokens_BC, targets_BC, first.carry, torch.zeros(2, dtype=torch.bool))


def test_a_full_gradient_is_that_of_the_formula() -> None:
    model = canvas(pattern=["attn"], gradient_cycles=2)
    tokens_BC, targets_BC = questions(3)
    last_B = torch.zeros(3, dtype=torch.bool)
    found = model.loss(tokens_BC, targets_BC, model.begin(3), last_B)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, q, _ = naive(model, tokens_BC, model.begin(3))
    scored = targets_BC != IGNORED
    nats = model.cross_entropy(logits, targets_BC)
    right = ((logits.argmax(-1) == targets_BC) | ~scored).all(1).double()
    halting = torch.nn.functional.binary_cross_entropy_with_logits(q[:, HALT], right)
    ((nats.sum(1) / scored.sum(1)).mean() + 0.5 * halting).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_stablemax_is_its_formula() -> None:
    model = canvas(pattern=["attn"])
    logits = torch.randn(2, CELLS, VOCAB, dtype=torch.float64) * 5
    _, targets_BC = questions(2)
    nats = model.cross_entropy(logits, targets_BC)
    for row, cell in (targets_BC != IGNORED).nonzero().tolist():
        s = [x + 1 if x >= 0 else 1 / (1 - x) for x in logits[row, cell].tolist()]
        expected = -math.log(s[int(targets_BC[row, cell])] / sum(s))
        assert float(nats[row, cell]) == pytest.approx(expected)
    assert bool((nats[targets_BC == IGNORED] == 0).all())


def test_the_value_of_going_on_is_the_better_one_of_the_next_step() -> None:
    model = canvas(pattern=["attn"], halting={"type": "q_learning", "weight": 1.0})
    tokens_BC, targets_BC = questions(4)
    last_B = torch.tensor([False, True, False, True])
    carry = model.begin(4)
    out = model(tokens_BC, carry)
    later = model(tokens_BC, out.carry).q_BQ
    best = torch.where(last_B, later[:, 0], later.amax(1)).sigmoid()
    right = model.loss(tokens_BC, targets_BC, carry, last_B).right_B.double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(out.q_BQ[:, 0], right) + bce(out.q_BQ[:, 1], best)
    found = model.loss(tokens_BC, targets_BC, carry, last_B)
    torch.testing.assert_close(found.halting, expected)
    assert torch.equal(model.halts(out.q_BQ), out.q_BQ[:, 0] > out.q_BQ[:, 1])


def test_at_first_nothing_halts() -> None:
    torch.manual_seed(0)
    tree = canvas(pattern=["attn"]).config
    fresh = Canvas(tree)
    *_, out = fresh.steps(questions(3)[0])
    torch.testing.assert_close(out.q_BQ, torch.full((3, 1), -5.0))
    assert not fresh.halts(out.q_BQ).any()


def test_documents_are_laid_out_and_scores_brought_back() -> None:
    model = canvas(pattern=["attn"])
    marker = 1
    tokens_BT = torch.tensor([[marker, 5, 6, 7, 8, 9], [marker, 4, 3, 2, 0, 0]])
    targets_BT = torch.tensor(
        [[IGNORED, IGNORED, IGNORED, 8, 9, 2], [IGNORED, IGNORED, 2, 7, IGNORED, IGNORED]]
    )
    tokens_BC, targets_BC = model.laid_out(tokens_BT, targets_BT)
    assert tokens_BC.tolist() == [[5, 6, 7, 0, 0, 0, 0], [4, 3, 0, 0, 0, 0, 0]]
    assert targets_BC[:, :3].tolist() == [[8, 9, 2], [2, 7, IGNORED]]
    nats_BT, _ = model.token_losses(tokens_BT, targets_BT, model.init_state(2))
    *_, out = model.steps(tokens_BC)
    nats_BC = model.cross_entropy(out.logits_BCV, targets_BC)
    torch.testing.assert_close(nats_BT[0, 3:], nats_BC[0, :3])
    torch.testing.assert_close(nats_BT[1, 2:4], nats_BC[1, :2])
    assert bool((nats_BT[targets_BT == IGNORED] == 0).all())
    wrong_BT, _ = model.misses(tokens_BT, targets_BT, model.init_state(2))
    assert bool(wrong_BT[0, 3]) == (int(out.logits_BCV[0, 0].argmax()) != 8)
    with pytest.raises(ValueError, match="no room"):
        model.laid_out(torch.ones(1, 12, dtype=torch.int64), torch.tensor([[IGNORED] * 11 + [3]]))


@pytest.mark.parametrize("name", ["plain", "two layers"])
def test_costs_are_what_a_step_computes(name: str) -> None:
    model = canvas(**CANVASES[name]).float()
    tokens_BC, _ = questions(2)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(tokens_BC, model.begin(2))
    head = 2 * 16 * VOCAB * 2 * CELLS + 2 * 16 * 2
    found = 2 * CELLS * sum(cost.flops_per_token for _, cost in model.costs(CELLS))
    assert found == pytest.approx(counter.get_total_flops() - head, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ["attn", "other"]}, "no block 'other'"),
        ({"gradient_cycles": 3}, "more than the 2 h_cycles"),
        ({"window": 3}, "leave it out"),
    ],
)
def test_wrong_canvases_are_told(change: dict[str, Any], message: str) -> None:
    window = change.pop("window", None)
    block = {
        "mixer": {"type": "attention", "num_heads": 2, "window": window},
        "ffn": {"type": "swiglu"},
    }
    core = {"pattern": ["attn"], "h_cycles": 2, "cells": 4, **change}
    tree = {
        "vocab_size": 9,
        "dim": 8,
        "core": {"type": "canvas", "blocks": {"attn": block}, **core},
    }
    with pytest.raises((ValueError, MisfitError), match=message):
        ModelConfig.model_validate(tree)


def test_a_canvas_is_no_language_model() -> None:
    with pytest.raises(ValueError, match="no language model"):
        HybridLM(canvas(pattern=["attn"]).config)
    stack = {"type": "stack", "blocks": {"attn": BLOCKS["attn"]}, "pattern": ["attn"]}
    with pytest.raises(ValueError, match="no canvas"):
        Canvas(ModelConfig.model_validate({"vocab_size": 9, "dim": 8, "core": stack}))
