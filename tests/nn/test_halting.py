"""Tokens that are done leave the loops: rules by hand, and what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from tests.nn.menu import HALTING, VOCAB, awake, recursive_config
from valkyrie_core.evaluate.rules import looping
from valkyrie_core.nn.block import Block
from valkyrie_core.nn.halting import (
    KL,
    Argmax,
    ArgmaxConfig,
    Confidence,
    ConfidenceConfig,
    KLConfig,
    Latent,
    LatentConfig,
    Thought,
)
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.selection import select


def tokens(time: int = 19, rows: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (rows, time), generator=torch.Generator().manual_seed(2))


def core_of(model: HybridLM) -> Recursive:
    assert isinstance(model.core, Recursive)
    return model.core


def halting(rule: dict[str, Any], pattern: str = "a", **extra: Any) -> HybridLM:
    return awake(recursive_config(pattern, halting=rule, **extra))


def logits(model: HybridLM, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x, model.init_state(len(x))).logits_BTV


@pytest.mark.parametrize("name", HALTING)
def test_the_laws_are_about_tokens_that_halt_at_several_loops(name: str) -> None:
    model = awake(HALTING[name])
    with torch.no_grad():
        _, _, ctx = model._hidden(tokens(), model.init_state(3), None)
    assert ctx.loops_BT is not None
    assert (ctx.loops_BT[:, 0] == 3).all()
    assert len(ctx.loops_BT[:, 1:].unique()) > 1, ctx.loops_BT.unique(return_counts=True)


def test_what_never_halts_is_the_whole_model() -> None:
    model = halting({"type": "latent", "threshold": 1e-9}, "ra")
    x = tokens()
    found = logits(model, x)
    core_of(model).halts = False
    torch.testing.assert_close(found, logits(model, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("min_loops", [1, 2])
def test_what_halts_at_once_is_a_model_of_fewer_loops(min_loops: int) -> None:
    model = halting({"type": "latent", "threshold": 1e9, "min_loops": min_loops}, "ra")
    x = tokens()
    found = logits(model, x)
    core_of(model).halts = False
    whole = logits(model, x)
    core_of(model).loops = min_loops
    torch.testing.assert_close(found[:, 1:], logits(model, x)[:, 1:], rtol=0, atol=1e-12)
    # a document's first token goes on: it tells every loop that it starts
    torch.testing.assert_close(found[:, 0], whole[:, 0], rtol=0, atol=1e-12)


def test_who_is_done_writes_nothing() -> None:
    model = halting({"type": "latent", "threshold": 1.0}, "a", loops=4)
    x = tokens(rows=1)
    with torch.no_grad():
        _, state, ctx = model._hidden(x, model.init_state(1), None)
    assert ctx.loops_BT is not None
    lengths = []
    for mixer_state, _ in state.layers:
        assert isinstance(mixer_state, KVState)
        lengths.append(mixer_state.length)
    assert lengths == [int((ctx.loops_BT > loop).sum()) for loop in range(4)]
    assert lengths[0] == x.shape[1] > lengths[-1]


def test_who_is_done_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = halting({"type": "latent", "threshold": 1e9}, "a", loops=5)
    widths: list[int] = []
    forward = Block.forward

    def counted(self: Block, x_BTD: Tensor, *args: Any) -> Any:
        widths.append(x_BTD.shape[1])
        return forward(self, x_BTD, *args)

    monkeypatch.setattr(Block, "forward", counted)
    with torch.no_grad():
        state = model(tokens(), model.init_state(3)).state
        assert widths == [19, 1, 1, 1, 1]
        widths.clear()
        model(tokens(1), state)
    assert widths == [1]


SURE = {"type": "confidence", "bias": 0.0, "then": "cheapest"}


def test_who_is_sure_goes_on_through_what_is_cheapest() -> None:
    model = halting({**SURE, "threshold": 1e-6}, "x", loops=3)
    x = tokens(rows=2)
    with torch.no_grad():
        _, state, ctx = model._hidden(x, model.init_state(2), None)
    first, *later = ctx.routes
    names = ("rwkv", "attn", "skip")
    assert len(first.used_BTM.flatten(0, 1).unique(dim=0)) > 1
    for route in later:
        # but for a document's first token, which goes on as ever
        assert route.used_BTM[:, 1:].all((0, 1)).tolist() == [name == "skip" for name in names]
        assert not route.used_BTM[:, 1:, :2].any()
    # all of them go through the rest of the block, in every loop
    kept = [mixer_state[3].length for mixer_state, _ in state.layers]
    assert kept[0] > 1
    assert kept[1:] == [1, 1]
    assert ctx.loops_BT is not None
    assert (ctx.loops_BT[:, 1:] == 1).all()
    assert ctx.sure_BT is None
    halted = halting({**SURE, "threshold": 1e-6, "then": "halt"}, "x", loops=3)
    assert not torch.allclose(logits(model, x)[:, 1:], logits(halted, x)[:, 1:])


def test_who_is_never_sure_is_routed_as_ever() -> None:
    model = halting({**SURE, "threshold": 1 - 1e-6}, "x", loops=3)
    x = tokens()
    found = logits(model, x)
    core_of(model).halts = False
    assert torch.equal(found, logits(model, x))


def test_another_threshold_keeps_what_becomes_of_sure_tokens() -> None:
    model = halting({**SURE, "threshold": 0.5}, "xr", loops=3)
    with looping(model, ConfidenceConfig(threshold=0.7), None):
        core = core_of(model)
        assert isinstance(core.halting, Confidence)
        assert core.halting.threshold == 0.7
        assert core.sure_go_on


def test_sure_tokens_need_a_router() -> None:
    with pytest.raises(ValidationError, match="no block of the pattern is routed"):
        recursive_config("a", halting=SURE)
    with pytest.raises(ValidationError, match="no block of the pattern is routed"):
        recursive_config("a", prelude="x", halting=SURE)


def thought(before: Tensor, after: Tensor) -> Thought:
    return Thought(before, after, lambda h_RD: 2 * h_RD)


def test_rules_by_hand() -> None:
    before = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    after = torch.tensor([[3.0, 4.1], [3.0, 5.0]])
    done, _ = Latent(LatentConfig(threshold=0.05))(thought(before, after), ())
    assert done.tolist() == [True, False]
    kl = F.kl_div(
        (2 * before).log_softmax(-1), (2 * after).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert kl[0] < kl[1]
    done, _ = KL(KLConfig(threshold=float(kl.mean())))(thought(before, after), ())
    assert done.tolist() == [True, False]
    rule = Argmax(ArgmaxConfig(patience=2))
    memory = rule.begin(2, before)
    answers = ([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]])
    found = []
    for answer in answers:
        done, memory = rule(thought(before, torch.tensor(answer)), memory)
        found.append(done.tolist())
    assert found == [[False, False], [True, False], [False, True]]


def test_confidence_learns_beside_the_model() -> None:
    torch.manual_seed(0)
    config = recursive_config("a", halting={"type": "confidence"})
    model = HybridLM(config).double()
    rule = core_of(model).halting
    assert isinstance(rule, Confidence)
    x, y = tokens(), tokens().flip(1)
    y[0, :5] = -100
    loss, _, told = model.loss(x, y, model.init_state(3))
    torch.autograd.backward(loss)
    assert rule.weight_D.grad is not None
    assert rule.weight_D.grad.norm() > 0
    with_rule = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and "halting" not in name
    }
    core_of(model).halting = None
    model.zero_grad()
    torch.autograd.backward(model.loss(x, y, model.init_state(3))[0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(with_rule[name], parameter.grad, rtol=0, atol=1e-14)
    # by hand: with no weights all tokens have the chance of the bias
    between = told.aux["confidence"].item()
    p = torch.sigmoid(torch.tensor(-3.0)).item()
    low, high = sorted((-torch.tensor(p).log().item(), -torch.tensor(1 - p).log().item()))
    assert low - 1e-6 < between < high + 1e-6
    # and nobody halts before it has learned to
    core_of(model).halting, core_of(model).halts = rule, True
    with torch.no_grad():
        _, _, ctx = model._hidden(x, model.init_state(3), None)
    assert ctx.loops_BT is not None
    assert (ctx.loops_BT == 3).all()


def test_confidences_near_one_differ_in_bf16() -> None:
    rule = Confidence(4, ConfidenceConfig(bias=8.0))
    with torch.autocast("cpu", torch.bfloat16):
        said = rule.logits(torch.ones(1, 4, dtype=torch.bfloat16)).sigmoid()
    assert 0.9996 < float(said.detach()) < 0.9997


def test_confidence_learns_of_every_real_token_scored_or_not() -> None:
    torch.manual_seed(0)
    model = HybridLM(recursive_config("a", halting={"type": "confidence"})).double()
    rule = core_of(model).halting
    assert isinstance(rule, Confidence)
    torch.nn.init.normal_(rule.weight_D)
    x = tokens()
    doc = torch.zeros_like(x)
    doc[1, 11:] = -1
    scored = x.masked_fill(torch.arange(19) < 15, -100).masked_fill(doc < 0, -100)

    def told(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return model.loss(tokens_BT, targets_BT, model.init_state(3), doc)[2].aux["confidence"]

    found = told(x, scored)
    torch.testing.assert_close(told(x, x.masked_fill(doc < 0, -100)), found, rtol=0, atol=0)
    torch.testing.assert_close(told(x.masked_fill(doc < 0, 1), scored), found)
    # by hand
    core_of(model).keeps_between = True
    with torch.no_grad():
        x_BTD, _, ctx = model._hidden(x, model.init_state(3), doc)
        last = model.head(x_BTD).argmax(-1)[doc >= 0]
        parts = [
            F.binary_cross_entropy(
                rule.logits(h_BTD)[doc >= 0].sigmoid(),
                (model.head(model.head_norm(h_BTD)).argmax(-1)[doc >= 0] == last).double(),
            )
            for h_BTD in ctx.between
        ]
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_selected_tokens_go_and_come_back() -> None:
    active = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    chosen = select(active)
    assert chosen.real_BK.tolist() == [[True, True, True], [True, False, False]]
    x = torch.arange(8.0).view(2, 4)
    assert chosen.take(x)[chosen.real_BK].tolist() == [0, 2, 3, 7]
    changed = chosen.put(x, chosen.take(x) + 100)
    assert changed.tolist() == [[100, 1, 102, 103], [4, 5, 6, 107]]
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert select(torch.zeros(2, 3, dtype=torch.bool)).index_BK.shape == (2, 0)
