"""Layers of recurrence and of attention that hear each other."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tests.nn.menu import VOCAB, awake, hybrid_config
from valkyrie_core.nn import decode
from valkyrie_core.nn.block import Block
from valkyrie_core.nn.decode import Decoder
from valkyrie_core.nn.model import HybridLM

GATED = {"type": "gated"}


def logits(model: HybridLM) -> torch.Tensor:
    tokens_BT = torch.randint(0, VOCAB, (2, 15), generator=torch.Generator().manual_seed(0))
    return model(tokens_BT, model.init_state(2)).logits_BTV


def blocks(model: HybridLM) -> list[Block]:
    return [layer for layer in model.core.layers if isinstance(layer, Block)]


def test_a_layer_hears_the_latest_one_of_the_other_kind() -> None:
    model = awake(hybrid_config("rraar", feedback=GATED))
    hears = [block.heard_D is not None for block in blocks(model)]
    assert hears == [False, False, True, True, True]
    heard: list[tuple[int, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}
    for index, block in enumerate(blocks(model)):
        block.mixer.register_forward_hook(
            lambda _m, _i, out, index=index: made.__setitem__(index, out[0])
        )
        if block.heard_norm is not None:
            block.heard_norm.register_forward_pre_hook(
                lambda _m, inputs, index=index: heard.append((index, inputs[0]))
            )
    logits(model)
    assert [index for index, _ in heard] == [2, 3, 4]
    for (_, x), source in zip(heard, (1, 1, 3), strict=True):
        assert x is made[source]


def test_gates_begin_at_zero_and_learn() -> None:
    torch.manual_seed(0)
    plain = HybridLM(hybrid_config("ra")).double()
    torch.manual_seed(0)
    model = HybridLM(hybrid_config("ra", feedback=GATED)).double()
    shared = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name in shared:
            parameter.data.copy_(shared[name].data)
    with torch.no_grad():
        # as drawn, what a mixer makes is zero
        for one in (plain, model):
            for block in blocks(one):
                block.mixer.output.weight.copy_(torch.eye(16))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    gate_D = blocks(model)[1].heard_D
    assert gate_D is not None
    (grad_D,) = torch.autograd.grad((logits(model) ** 2).sum(), gate_D)
    assert float(grad_D.abs().min()) > 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValidationError, match="the blocks have rwkv7"):
        hybrid_config("rr", feedback=GATED)


def test_decoding_runs_the_model_as_a_whole_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_announced", set())
    model = awake(hybrid_config("ra", feedback=GATED)).float().eval()
    decoder = Decoder(model)
    tokens_BT = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(tokens_BT, model.init_state(2)).logits_BTV
    state = model.init_state(2)
    with torch.inference_mode():
        for t in range(9):
            logits_BV, state = decoder.step(tokens_BT[:, t], state)
            torch.testing.assert_close(logits_BV, expected[:, t], rtol=1e-4, atol=1e-4)
    assert "hear each other" in caplog.text
