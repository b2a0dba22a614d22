"""The looped core beside its formula, its loss between loops, and its costs."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from tests.nn.menu import VOCAB, awake, recursive_config
from valkyrie_core.nn.block import Block
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.plan.flops import training_flops
from valkyrie_core.plan.parameters import count_parameters, unrolled_parameters, weightless


def tokens(time: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, time), generator=torch.Generator().manual_seed(seed))


def by_formula(model: HybridLM, tokens_BT: Tensor, loops: int) -> list[Tensor]:
    """What the residual stream is after each loop, from the paper's formula, the last one after
    the coda; every layer begins with a state of its own in every loop."""
    core = model.core
    assert isinstance(core, Recursive)
    ctx, _ = model._enter(model.init_state(2), tokens_BT, None)
    before, looped, after = core._once

    def through(indices: range, x_BTD: Tensor) -> Tensor:
        nonlocal ctx
        for i in indices:
            layer = core.layers[i]
            assert isinstance(layer, Block)
            fresh = layer.init_state(2, device=x_BTD.device, dtype=x_BTD.dtype)
            x_BTD, _, ctx = layer(x_BTD, fresh, ctx)
        return x_BTD

    e_BTD = through(before, model.embedding_norm(model.embedding(tokens_BT)))
    h_BTD, found = torch.zeros_like(e_BTD), []
    for t in range(loops):
        y_BTD = through(looped, core.loop_norm(h_BTD + core.inject_D * e_BTD))
        h_BTD = y_BTD + core.keep_LD[t] * h_BTD
        found.append(h_BTD)
    found[-1] = through(after, found[-1])
    return found


@pytest.mark.parametrize(
    "config",
    [
        recursive_config("ra", prelude="a", coda="r"),
        recursive_config("r", loops=4),
        recursive_config("a", loops=1),
    ],
)
def test_it_is_its_formula(config: object) -> None:
    model = awake(config)  # type: ignore[arg-type]
    assert isinstance(model.core, Recursive)
    x = tokens()
    with torch.no_grad():
        expected = model.head(model.head_norm(by_formula(model, x, model.core.loops)[-1]))
        found = model(x, model.init_state(2)).logits_BTV
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_head_reads_between_loops_in_training_alone() -> None:
    tree = recursive_config("ra", loops=3).model_dump(mode="json")
    tree["core"]["loop_loss"] = 0.5
    model = awake(type(recursive_config("r")).model_validate(tree))
    x, y = tokens(), tokens(seed=1)
    y[0, :4] = -100
    total, _, told = model.loss(x, y, model.init_state(2))
    each = [
        F.cross_entropy(model.head(model.head_norm(h)).flatten(0, 1), y.flatten())
        for h in by_formula(model, x, 3)
    ]
    assert told.aux["loops"].item() == pytest.approx(0.25 * (each[0] + each[1]).item())
    assert total.item() == pytest.approx(each[2].item() + told.aux["loops"].item())
    with torch.no_grad():
        plain, _, told = model.loss(x, y, model.init_state(2))
    assert plain.item() == pytest.approx(each[2].item())
    assert not told.aux


def test_recomputing_changes_no_gradient() -> None:
    model = awake(recursive_config("ra", prelude="r", loops=3))
    x, y = tokens(), tokens(seed=1)
    gradients = []
    for recomputes in (False, True):
        model.core.recomputes = recomputes
        model.zero_grad()
        torch.autograd.backward(model.loss(x, y, model.init_state(2))[0])
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_loops_cost_time_and_no_parameters() -> None:
    once = weightless(recursive_config("a", loops=1))
    thrice = weightless(recursive_config("a", loops=3))
    head = training_flops(once, 64)["head"]
    flops = [sum(training_flops(model, 64).values()) - head for model in (once, thrice)]
    assert flops[1] == 3 * flops[0]
    # a gate by loop is all that comes on top
    difference = count_parameters(thrice).total - count_parameters(once).total
    assert difference == 2 * 16
    block = sum(parameter.numel() for parameter in once.core.layers[0].parameters())
    assert unrolled_parameters(once) == count_parameters(once).total
    assert unrolled_parameters(thrice) == count_parameters(thrice).total + 2 * block
    assert once.flops_per_token(64)["attention"] * 3 == thrice.flops_per_token(64)["attention"]


def test_it_thinks_longer_than_it_was_trained_to() -> None:
    model = awake(recursive_config("ra", loops=2))
    assert isinstance(model.core, Recursive)
    model.core.loops = 4
    x = tokens()
    with torch.no_grad():
        whole = model(x, model.init_state(2)).logits_BTV
        first = model(x[:, :5], model.init_state(2))
        rest = model(x[:, 5:], first.state)
    assert len(first.state.layers) == 8
    pieces = torch.cat([first.logits_BTV, rest.logits_BTV], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-10)


def test_what_can_not_be_looped() -> None:
    tree = recursive_config("ra", coda="r").model_dump(mode="json")
    for path, value, told in (
        ("pattern", ["x"], "no block 'x'"),
        ("prelude", ["r", "y"], "no block 'y'"),
        ("pattern", [], "at least 1"),
        ("loops", 0, "greater than or equal to 1"),
        ("loop_loss", 1.0, "between a loop and a coda"),
    ):
        wrong = {**tree, "core": {**tree["core"], path: value}}
        with pytest.raises(ValidationError, match=told):
            type(recursive_config("r")).model_validate(wrong)
