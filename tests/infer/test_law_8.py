"""Law 8: log-probabilities of the training path equal those of prefill and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.menu import CONFIGS, HALTING, VOCAB, awake
from valkyrie_core.infer.engine import Engine
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.moe.gates import NoisyTopK, Switch


def window(B: int = 2, T: int = 21) -> Tensor:
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


def log_probs_of_training(model: HybridLM, tokens_BT: Tensor) -> Tensor:
    """[B, T - 1], in one window, as the loss sees them."""
    # some gates draw noise in training, and must not here
    noisy = any(isinstance(module, NoisyTopK | Switch) for module in model.modules())
    model.train(not noisy)
    losses_BT, _ = model.token_losses(tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(2))
    loss, _, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(2))
    assert float(loss.detach()) == pytest.approx(float(losses_BT.mean().detach()), rel=1e-5)
    return -losses_BT.detach()


def log_probs_of_decoding(engine: Engine, tokens_BT: Tensor, prompt: int) -> Tensor:
    """[B, T - prompt]: a prefill, then token by token."""
    known = engine.prefill(tokens_BT[:, :prompt], engine.model.init_state(tokens_BT.shape[0]))
    found = []
    for t in range(prompt, tokens_BT.shape[1]):
        assert known is not None
        log_probs_BV = known.logits_BV.log_softmax(-1)
        found.append(log_probs_BV.gather(1, tokens_BT[:, t : t + 1])[:, 0])
        known = engine.decode_one_token(tokens_BT[:, t], known.state)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("prompt", [1, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_equals_decoding(
    name: str, prompt: int, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALKYRIE_NATIVE", native)
    model = awake(CONFIGS[name]).float()
    tokens_BT = window()
    expected = log_probs_of_training(model, tokens_BT)[:, prompt - 1 :]
    found = log_probs_of_decoding(Engine(model), tokens_BT, prompt)
    assert float((found - expected).abs().max()) < 1e-4
    # a law that compares constants would hold trivially
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("name", HALTING)
def test_tokens_that_halt_have_one_probability_in_a_window_and_alone(name: str) -> None:
    """In fp64: whether a token is done is a discrete choice."""
    model = awake(HALTING[name])
    tokens_BT = window()
    with torch.no_grad():
        losses_BT, _ = model.token_losses(tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(2))
    found = log_probs_of_decoding(Engine(model), tokens_BT, 8)
    assert float((found + losses_BT[:, 7:]).abs().max()) < 1e-9
    loops_BT = model(tokens_BT, model.init_state(2)).told.loops_BT
    assert len(set(loops_BT.flatten().tolist())) > 1


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"weights": "bf16"}, 0.3),
        ({"weights": "bf16", "precision": "bf16"}, 0.5),
        ({"weights": "int8"}, 0.5),
        ({"weights": "int8", "precision": "bf16"}, 0.5),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_fewer_bits_have_a_gap_that_is_small_and_not_nothing(
    name: str, settings: dict[str, Any], limit: float
) -> None:
    model = awake(CONFIGS[name]).float()
    tokens_BT = window()
    expected = log_probs_of_training(model, tokens_BT)[:, 7:]
    found = log_probs_of_decoding(Engine(model, **settings), tokens_BT, 8)
    gap = float((found - expected).abs().max())
    assert 1e-4 < gap < limit * float(expected.abs().max())
