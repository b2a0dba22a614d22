"""Routers among mixers: equal to their slow twins, hard and soft, and nothing runs for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.nn.menu import ATTENTION, RWKV, SKIP
from valkyrie_core.errors import RecipeError
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.lots import drawn_at, lots
from valkyrie_core.nn.routed import RoutedConfig, RoutedMixer
from valkyrie_core.nn.router_scores import held, smoothed
from valkyrie_core.nn.routers import foreseen, settle_routers
from valkyrie_core.nn.skip import Skip
from valkyrie_core.nn.state import Ctx

DIM = 16
THREE = {"rwkv": RWKV, "attn": ATTENTION, "skip": SKIP}


def routed(*, seed: int = 0, **keys: Any) -> RoutedMixer:
    """A mixer whose every weight matters, in fp64."""
    torch.manual_seed(seed)
    config = RoutedConfig.model_validate({"mixers": THREE, **keys})
    mixer = config.build(DIM, layer_idx=0, num_layers=2).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def text(B: int, T: int, seed: int = 1) -> tuple[Tensor, Ctx]:
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(B, T, DIM, generator=generator, dtype=torch.float64)
    pos_BT = torch.arange(T).expand(B, T)
    return x_BTD, Ctx(pos_BT, torch.zeros_like(pos_BT))


def begin(mixer: Any, B: int) -> Any:
    return mixer.init_state(B, device=torch.device("cpu"), dtype=torch.float64)


def test_soft_is_the_weighted_sum_of_all() -> None:
    mixer = routed(adaptation=0.6)
    x_BTD, ctx = text(3, 11)
    y_BTD, _, after = mixer(x_BTD, begin(mixer, 3), ctx)
    scores_BTM = x_BTD @ mixer.router.weight_MD.T + mixer.router.bias_M
    s, rows = torch.zeros(3, 3, dtype=torch.float64), []
    for t in range(11):
        s = scores_BTM[:, t] if t == 0 else s + 0.6 * (scores_BTM[:, t] - s)
        rows.append(s.softmax(-1))
    gates_BTM = torch.stack(rows, 1)
    expected = torch.zeros_like(x_BTD)
    for number, inner in enumerate(mixer.mixers):
        own = inner(x_BTD, begin(inner, 3), ctx)[0]
        expected = expected + gates_BTM[..., number : number + 1] * mixer.scale_M[number] * own
    torch.testing.assert_close(y_BTD, expected)
    (route,) = after.routes
    torch.testing.assert_close(route.shares_M, gates_BTM.mean((0, 1)))
    assert after.v_first_BTD is None


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"confidence_threshold": 0.6},
        {"gate": "sparsemax", "adaptation": 0.5},
        {"block_len": 3, "adaptation": 0.5},
    ],
)
def test_hard_is_each_mixer_over_its_own_tokens(keys: dict[str, Any]) -> None:
    mixer = routed(soft_share=0, **keys)
    x_BTD, ctx = text(4, 19)
    x_BTD.requires_grad_()
    y_BTD, _, after = mixer(x_BTD, begin(mixer, 4), ctx)
    (route,) = after.routes
    counts = route.used_BTM.sum((0, 1))
    assert (counts > 0).all(), "every mixer is chosen somewhere"
    assert int(counts.sum()) < route.used_BTM.numel()
    torch.testing.assert_close(
        (route.gates_BTM * route.used_BTM).sum(-1), torch.ones(4, 19).double()
    )
    expected = torch.zeros_like(x_BTD)
    for number, inner in enumerate(mixer.mixers):
        for row in range(4):
            # the first token goes through all, and counts where it was chosen
            places = [t for t in range(19) if t == 0 or route.used_BTM[row, t, number]]
            own_ctx = Ctx(ctx.pos_BT[row : row + 1, places], ctx.segment_BT[row : row + 1, places])
            own = inner(x_BTD[row : row + 1, places], begin(inner, 1), own_ctx)[0][0]
            gates = route.gates_BTM[row, places, number] * mixer.scale_M[number]
            expected[row, places] += gates[:, None] * own
    torch.testing.assert_close(y_BTD, expected)


def test_what_is_not_chosen_does_not_run() -> None:
    mixer = routed(soft_share=0)
    seen: dict[int, int] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        ctx = inputs[2]
        real = ctx.valid_BT if ctx.valid_BT is not None else torch.ones_like(ctx.pos_BT)
        seen[id(module)] = int(real.sum())

    for inner in mixer.mixers:
        inner.register_forward_pre_hook(count)
    x_BTD, ctx = text(5, 40)
    _, _, after = mixer(x_BTD, begin(mixer, 5), ctx)
    used_BTM = after.routes[0].used_BTM.clone()
    used_BTM[:, 0] = True
    for number, inner in enumerate(mixer.mixers):
        ran = seen.get(id(inner), 0)
        assert ran == (0 if isinstance(inner, Skip) else int(used_BTM[..., number].sum()))
    # a row whose tokens all skip leaves every state as it was
    with torch.no_grad():
        mixer.router.bias_M.copy_(torch.tensor([-99.0, -99.0, 99.0]))
    state = begin(mixer, 5)
    _, state, _ = mixer(x_BTD[:, :1], state, Ctx(ctx.pos_BT[:, :1], ctx.segment_BT[:, :1]))
    later = Ctx(ctx.pos_BT[:, 1:], ctx.segment_BT[:, 1:])
    y_BTD, after_state, _ = mixer(x_BTD[:, 1:], state, later)
    assert (y_BTD == 0).all()
    assert after_state[2].wkv_BNHH is state[2].wkv_BNHH
    assert after_state[3].length == state[3].length == 1


def test_choices_learn() -> None:
    mixer = routed(soft_share=0, budget={"flops": 0.5, "rate": 1.0})
    x_BTD, ctx = text(4, 30)
    y_BTD, _, _ = mixer(x_BTD, begin(mixer, 4), ctx)
    (grad_MD,) = torch.autograd.grad((y_BTD**2).sum(), mixer.router.weight_MD)
    assert float(grad_MD.abs().max()) > 1e-4
    # a price moves scores away from what is costly
    mixer.charge([1.0, 1.0, 0.0])
    _, _, after = mixer(x_BTD, begin(mixer, 4), ctx)
    ((name, loss),) = after.aux
    (grad_M,) = torch.autograd.grad(loss, mixer.router.bias_M)
    assert name == "budget"
    cheapest, costliest = mixer.shares.index(min(mixer.shares)), mixer.shares.index(1.0)
    assert float(grad_M[cheapest]) < 0 < float(grad_M[costliest])
    operations = sum(a * b for a, b in zip(after.routes[0].shares_M, mixer.shares, strict=True))
    assert float(loss.detach()) == pytest.approx(float(mixer.price * (operations - 0.5)))


def test_a_price_rises_while_operations_are_too_many_and_is_never_paid_back() -> None:
    mixer = routed(budget={"flops": 0.6, "rate": 0.1})
    rwkv, attn = mixer.shares[:2]
    assert max(rwkv, attn) == 1
    assert mixer.shares[2] == 0
    assert mixer.charge([0.5, 0.5, 0.0]) == pytest.approx(0.5 * rwkv + 0.5 * attn)
    before = float(mixer.price)
    assert before == pytest.approx(0.1 * (0.5 * rwkv + 0.5 * attn - 0.6))
    mixer.charge([0.0, 0.0, 1.0])
    assert float(mixer.price) == max(0.0, before - 0.06)
    for _ in range(5):
        mixer.charge([0.0, 0.0, 1.0])
    assert float(mixer.price) == 0


def test_it_grows_hard_and_stays_so_through_a_file() -> None:
    mixer = routed(soft_share=0.5)
    softness = []
    for done in (0.0, 0.25, 0.49, 0.5, 0.9):
        mixer.anneal(done)
        softness.append((round(float(mixer.softness), 3), mixer.hard))
    assert softness == [(1.0, False), (0.5, False), (0.02, False), (0.0, True), (0.0, True)]
    other = routed(soft_share=0.5, seed=3)
    assert not other.hard
    other.load_state_dict(mixer.state_dict())
    settle_routers(other)
    assert other.hard
    always = routed(soft_share=1)
    always.anneal(1.0)
    assert not always.hard
    # the operations that are told are those of what ran
    mixer.charge([0.25, 0.25, 0.5])
    router = 2 * mixer.router.weight_MD.numel()
    # a quarter of the tokens, each with a quarter of the context
    rwkv, attn, _ = (inner.cost(16).flops_per_token for inner in mixer.each)
    told = mixer.cost(64).flops_per_token
    assert told - router == pytest.approx((rwkv + attn) / 4, abs=2)
    assert mixer.cost(64).state_bytes == routed(soft_share=0.5).cost(64).state_bytes


@pytest.mark.parametrize("adaptation", [1.0, 0.3])
@pytest.mark.parametrize("T", [1, 5, 300])
def test_smoothing_is_its_recursion(adaptation: float, T: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, T, 2, generator=generator, dtype=torch.float64)
    before = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    fresh = torch.rand(3, T, generator=generator) < 0.1
    valid = (torch.rand(3, T, generator=generator) < 0.7) | fresh
    pos = torch.ones(3, T, dtype=torch.int64)
    ctx = Ctx(pos, pos, fresh_BT=fresh, valid_BT=valid)
    found = smoothed(scores, before, ctx, adaptation)
    for row in range(3):
        s = before[row]
        for t in range(T):
            if fresh[row, t]:
                s = scores[row, t]
            elif valid[row, t]:
                s = s + adaptation * (scores[row, t] - s)
            torch.testing.assert_close(found[row, t], s)


def test_a_block_is_led_by_its_first_token() -> None:
    scores = torch.arange(14, dtype=torch.float64).view(1, 14, 1)
    pos = torch.tensor([[5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    ctx = Ctx(pos, pos)
    found = held(scores, torch.tensor([[-1.0]]), ctx, 4)[0, :, 0].tolist()
    assert found == [-1, -1, -1, 3, 3, 5, 5, 5, 5, 9, 9, 9, 9, 13]


def test_wrong_keys_are_told() -> None:
    with pytest.raises(ValueError, match="every one of the mixers skips"):
        RoutedConfig.model_validate({"mixers": {"a": SKIP, "b": SKIP}})
    with pytest.raises(ValueError, match="belongs to gate: softmax"):
        routed(gate="sparsemax", confidence_threshold=0.5)
    block = {
        "mixer": {"type": "routed", "mixers": {"rwkv": {**RWKV, "head_dim": 7}, "skip": SKIP}},
        "ffn": {"type": "swiglu"},
    }
    core = {"type": "stack", "blocks": {"b": block}, "pattern": ["b"]}
    with pytest.raises(ValidationError, match=r"head_dim \(7\) must divide dim \(16\)"):
        ModelConfig.model_validate({"vocab_size": 9, "dim": DIM, "core": core})
    canvas = {"type": "canvas", "cells": 4, "blocks": {"b": block}, "pattern": ["b"]}
    with pytest.raises(ValidationError, match="routed looks back alone"):
        ModelConfig.model_validate({"vocab_size": 9, "dim": DIM, "core": canvas})


@pytest.mark.parametrize("budget", [0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_lots_meet_the_budget(budget: float) -> None:
    costs = (1.0, 0.8, 0.0)
    each = lots(costs, budget)
    assert sum(each) == pytest.approx(1)
    assert min(each) >= 0
    assert sum(a * b for a, b in zip(each, costs, strict=True)) == pytest.approx(budget)
    if budget <= 0.6:
        # the mean of all: up to there the cheapest one is drawn more often, the others alike
        assert each[0] == pytest.approx(each[1])


def test_lots_without_a_budget_are_alike() -> None:
    assert lots((1.0, 0.8, 0.0), None) == pytest.approx((1 / 3,) * 3)
    assert lots((0.7, 0.7), 0.7) == pytest.approx((0.5, 0.5))


def test_lots_are_even_and_differ_from_layer_to_layer() -> None:
    pos_BT = torch.arange(4096)[None]
    first, second = (drawn_at(pos_BT, torch.tensor(salt))[0] for salt in (7, 2_000_000_011))
    for one in (first, second):
        counts = torch.histc(one.float(), bins=8, min=0, max=1)
        assert counts.sum() == 4096
        assert (counts - 512).abs().max() < 100
        assert torch.corrcoef(torch.stack([one[:-1], one[1:]]))[0, 1].abs() < 0.06
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.06
    # another seed draws otherwise, and what is drawn is in the file
    mixers = [routed(soft_share=0, gate="lot", seed=seed) for seed in (1, 2)]
    salts = [int(mixer.router.salt) for mixer in mixers]
    assert salts[0] != salts[1]
    mixers[0].load_state_dict(mixers[1].state_dict())
    assert int(mixers[0].router.salt) == salts[1]


def test_a_budget_that_no_mixer_keeps_is_refused() -> None:
    two = {"rwkv": RWKV, "attn": ATTENTION}
    with pytest.raises(RecipeError, match="the cheapest one takes"):
        routed(mixers=two, budget={"flops": 0.01})


def test_what_is_matched_by_is_soft_at_first_and_the_budget_then() -> None:
    mixer = routed(soft_share=0.25, budget={"flops": 0.4})
    used = foreseen(nn.Sequential(mixer))[0].used
    hard = [(one - 0.25) / 0.75 for one in used]
    assert sum(hard) == pytest.approx(1)
    assert sum(a * b for a, b in zip(hard, mixer.shares, strict=True)) == pytest.approx(0.4)
    assert routed(gate="sparsemax").foreseen() == (1.0, 1.0, 1.0)


def test_a_lot_looks_at_no_token() -> None:
    mixer = routed(soft_share=0, gate="lot", budget={"flops": 0.4})
    used = []
    for seed in (1, 2):
        x_BTD, ctx = text(3, 400, seed)
        _, _, after = mixer(x_BTD, begin(mixer, 3), ctx)
        used.append(after.routes[0].used_BTM)
    assert torch.equal(*used)
    taken = (used[0].double().mean((0, 1)) * torch.tensor(mixer.shares).double()).sum()
    assert float(taken) == pytest.approx(0.4, abs=0.05)
    assert (used[0][:, 1:].sum(-1) == 1).all()
