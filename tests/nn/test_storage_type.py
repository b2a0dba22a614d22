"""Matrices stored in bf16: the model of their values, in every way of running it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.nn.menu import FFNS, MIXERS, VOCAB, model_config
from valkyrie_core.infer.engine import Engine
from valkyrie_core.nn.layers import parameter_roles
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.storage_type import MATRICES, call, store

CASES = [(mixer, "channel_mix") for mixer in MIXERS] + [("attention", ffn) for ffn in FFNS]


def models(mixer: str, ffn: str, **extra: Any) -> tuple[HybridLM, HybridLM]:
    """A model with matrices in bf16, and one with the same values in fp32; no matrix is zero."""
    torch.manual_seed(0)
    narrow = HybridLM(model_config(mixer, ffn, **extra))
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    store(narrow, torch.bfloat16)
    wide = HybridLM(narrow.config)
    with torch.no_grad():
        for one, other in zip(wide.parameters(), narrow.parameters(), strict=True):
            one.copy_(other)
        # lots are drawn alike
        for one, other in zip(wide.buffers(), narrow.buffers(), strict=True):
            one.copy_(other)
    return narrow, wide


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
@pytest.mark.parametrize("recomputes", [False, True])
def test_loss_and_gradients_are_those_of_the_values(mixer: str, ffn: str, recomputes: bool) -> None:
    narrow, wide = models(mixer, ffn)
    losses = []
    for model in (narrow, wide):
        model.core.recomputes = recomputes
        # some gates draw noise
        torch.manual_seed(2)
        loss, _, _ = model.loss(tokens()[:, :-1], tokens()[:, 1:], model.init_state(2))
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, one), other in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == one.dtype
        scale = float(other.grad.abs().max()) + 1e-12
        assert float((one.grad - other.grad).abs().max()) <= 0.01 * scale, name


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
def test_reading_and_decoding_are_those_of_the_values(mixer: str, ffn: str) -> None:
    narrow, wide = models(mixer, ffn)
    found = []
    for model in (narrow, wide):
        engine = Engine(model)
        known = engine.prefill(tokens(), model.init_state(2))
        assert known is not None
        after = engine.decode_one_token(tokens()[:, 0], known.state)
        found.append((known.logits_BV, after.logits_BV))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "tied"])
def test_what_is_stored_in_bf16(head: str) -> None:
    model = HybridLM(model_config("rwkv7", "channel_mix", head=head), torch.bfloat16)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        narrow = roles[name] in MATRICES
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), name
    assert model.matrices == torch.bfloat16
    assert (model.head.weight is model.embedding.weight) == (head == "tied")
    # the state and the residual stream are as wide as ever
    assert model.init_state(1).layers[0][0].shift_BD.dtype == torch.float32


@pytest.mark.parametrize("head", ["linear", "tied"])
@pytest.mark.parametrize("matrices", [torch.float32, torch.bfloat16])
def test_an_unfilled_model_is_like_a_filled_one(head: str, matrices: torch.dtype) -> None:
    config = model_config("attention-alibi", "swiglu", head=head)
    drawn = torch.get_rng_state()
    empty = HybridLM.unfilled(config, "cpu", matrices)
    assert torch.equal(torch.get_rng_state(), drawn), "no number is drawn"
    full = HybridLM(config, matrices)
    assert (empty.head.weight is empty.embedding.weight) == (head == "tied")
    with torch.no_grad():
        for (name, one), (other_name, other) in zip(
            empty.named_parameters(), full.named_parameters(), strict=True
        ):
            assert (name, one.shape, one.dtype) == (other_name, other.shape, other.dtype)
            one.copy_(other)
    logits = [m(tokens(), m.init_state(2)).logits_BTV for m in (empty, full)]
    assert torch.equal(*logits)


def test_under_autocast_matrices_are_used_as_they_are() -> None:
    narrow, _ = models("attention", "swiglu")
    seen = []
    layer = narrow.core.layers[0]
    layer.register_forward_hook(lambda module, *_: seen.append(module.mixer.query.weight.dtype))
    x_BTD = torch.randn(1, 3, 16)
    state = narrow.init_state(1)
    ctx, _ = narrow._enter(state, tokens()[:1, :3], None)
    call(layer, x_BTD, state.layers[0], ctx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(layer, x_BTD, state.layers[0], ctx)
    assert seen == [torch.float32, torch.bfloat16]
