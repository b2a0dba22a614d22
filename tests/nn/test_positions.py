"""Positions and windows against independent twins in numpy, and what they do far away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.nn.menu import MIXERS, VOCAB, awake, model_config
from tests.reference import positions as reference
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.attention import Attention, AttentionConfig
from valkyrie_core.nn.decode import Decoder, ModuleStep
from valkyrie_core.nn.position import AlibiConfig, YarnConfig, rotation, slopes
from valkyrie_core.nn.state import Ctx, num_bytes

T, H, HEADS = 40, 8, 2
THETA, FACTOR, TRAINED = 50.0, 3.0, 12
YARN = {"type": "yarn", "theta": THETA, "factor": FACTOR, "trained_context": TRAINED}
CASES: dict[str, dict[str, Any]] = {
    "rope": {"position": {"type": "rope", "theta": THETA}},
    "yarn": {"position": YARN},
    "alibi": {"position": {"type": "alibi"}},
    "none": {"position": {"type": "none"}},
    "window": {"position": {"type": "rope", "theta": THETA}, "window": 6, "sinks": 3},
    "window without sinks": {"position": {"type": "rope", "theta": THETA}, "window": 6, "sinks": 0},
    "window, yarn": {"position": YARN, "window": 1, "sinks": 4},
    "window, alibi": {"position": {"type": "alibi"}, "window": 5, "sinks": 2},
    "window, none": {"position": {"type": "none"}, "window": 5, "sinks": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [T, 7, 1])
def test_attention_equals_its_numpy_twin(
    monkeypatch: pytest.MonkeyPatch, case: str, chunk: int
) -> None:
    monkeypatch.setattr(kv_cache, "TRIMMED_AT_ONCE", 1)
    torch.manual_seed(0)
    config = AttentionConfig.model_validate({"num_heads": HEADS, **CASES[case]})
    mixer = Attention(H * HEADS, config).double()
    torch.nn.init.normal_(mixer.output.weight)
    x_TD = torch.randn(T, H * HEADS, dtype=torch.float64)
    state = mixer.init_state(1, device=torch.device("cpu"), dtype=torch.float64)
    pieces = []
    with torch.no_grad():
        for start in range(0, T, chunk):
            pos_BT = torch.arange(start, min(start + chunk, T))[None]
            ctx = Ctx(pos_BT=pos_BT, segment_BT=torch.zeros_like(pos_BT))
            y_BTD, state, _ = mixer(x_TD[None, start : start + chunk], state, ctx)
            pieces.append(y_BTD[0])
        expected = twin(mixer, x_TD, config)
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=1e-10)


def twin(mixer: Attention, x_TD: Tensor, config: AttentionConfig) -> Tensor:
    q, k, v = (
        layer(x_TD).view(T, HEADS, H).numpy() for layer in (mixer.query, mixer.key, mixer.value)
    )
    eps = np.finfo(np.float64).eps
    q, k = (x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) for x in (q, k))
    kind = config.position.type
    frequency, temperature = None, 1.0
    if kind == "rope":
        frequency = lambda i: THETA ** (-2 * i / H)  # noqa: E731
    if kind == "yarn":
        frequency = lambda i: reference.yarn_frequency(i, H, THETA, FACTOR, TRAINED)  # noqa: E731
        temperature = reference.yarn_temperature(FACTOR)
    heads = [
        reference.attention(
            q[:, n],
            k[:, n],
            v[:, n],
            frequency=frequency,
            temperature=temperature,
            slope=reference.alibi_slope(n, HEADS) if kind == "alibi" else 0.0,
            window=config.window,
            sinks=config.sinks,
        )
        for n in range(HEADS)
    ]
    return torch.from_numpy(np.concatenate(heads, axis=1)) @ mixer.output.weight.T


def test_the_slopes_of_eight_heads_are_those_of_the_paper() -> None:
    found = slopes(AlibiConfig(), 8)
    assert found is not None
    assert found == tuple(2.0**-h for h in range(1, 9))


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    config = YarnConfig(theta=10_000, factor=8, trained_context=4096)
    found = rotation(config, 128, torch.float64)
    assert found is not None
    plain = 10_000 ** (-torch.arange(64, dtype=torch.float64) / 64)
    assert torch.equal(found.frequency_C[:10], plain[:10])
    torch.testing.assert_close(found.frequency_C[-10:], plain[-10:] / 8)
    for pair in (20, 30, 40, 45):
        expected = reference.yarn_frequency(pair, 128, 10_000, 8, 4096)
        assert float(found.frequency_C[pair]) == pytest.approx(expected, rel=1e-12)
    assert found.scale**2 == pytest.approx(reference.yarn_temperature(8))


def test_yarn_of_factor_one_is_rope() -> None:
    config = YarnConfig(theta=100, factor=1, trained_context=64)
    found = rotation(config, 16, torch.float64)
    assert found is not None
    torch.testing.assert_close(
        found.frequency_C, 100 ** (-torch.arange(8, dtype=torch.float64) / 8)
    )
    assert found.scale == 1


@pytest.mark.parametrize("name", [x for x in MIXERS if "window" in x])
def test_native_steps_trim_as_modules_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(kv_cache, "TRIMMED_AT_ONCE", 2)
    model = awake(model_config(name)).float().eval()
    tokens_BT = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(3))
    whole = model(tokens_BT, model.init_state(3)).logits_BTV
    decoder, state, old = Decoder(model), model.init_state(3), None
    for t in range(40):
        logits_BV, state = decoder.step(tokens_BT[:, t], state)
        torch.testing.assert_close(logits_BV, whole[:, t], rtol=1e-4, atol=1e-4)
        if t == 20:
            old = state
    assert decoder._steps is not None
    assert not any(
        isinstance(step, ModuleStep) for layer in decoder._steps.layers for step in layer
    )
    # the state of long ago is still what it was
    assert old is not None
    logits_BV, _ = decoder.step(tokens_BT[:, 21], old)
    torch.testing.assert_close(logits_BV, whole[:, 21], rtol=1e-4, atol=1e-4)


def test_the_cache_of_a_window_stops_growing() -> None:
    model = awake(model_config("attention-window")).float().eval()
    tokens_BT = torch.randint(0, VOCAB, (1, 4000), generator=torch.Generator().manual_seed(3))
    state, bytes_ = model.init_state(1), []
    with torch.inference_mode():
        for start in range(0, 4000, 100):
            state = model(tokens_BT[:, start : start + 100], state).state
            bytes_.append(num_bytes(state))
    assert max(bytes_[20:]) <= max(bytes_[:20])
