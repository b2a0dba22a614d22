"""What must hold at 16,384 tokens and beyond: one answer for every chunk, constant memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nn.menu import VOCAB, awake, hybrid_config, model_config
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.evaluate import long_context
from valkyrie_core.infer.engine import Engine
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM

LONG = 16_384
CONFIGS: dict[str, ModelConfig] = {
    "pure": hybrid_config("rr"),
    "hybrid": hybrid_config("ra"),
    "windowed": model_config("attention-window"),
    "alibi": model_config("attention-alibi"),
}


def model_of(name: str) -> HybridLM:
    return awake(CONFIGS[name]).float().eval()


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(NUM_RESERVED, VOCAB, (1, length), generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_any_chunk_gives_the_logits_of_the_whole(name: str) -> None:
    model, tokens_BT = model_of(name), tokens(LONG)
    with torch.inference_mode():
        whole = model(tokens_BT, model.init_state(1)).logits_BTV
        for chunk in (1, 7, 512, 1024):
            state, far = model.init_state(1), 0.0
            for start in range(0, LONG, chunk):
                out = model(tokens_BT[:, start : start + chunk], state)
                difference = out.logits_BTV - whole[:, start : start + chunk]
                far = max(far, float(difference.abs().max()))
                state = out.state
            assert far < 1e-4, f"chunks of {chunk}: {far}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pure", "windowed"])
def test_memory_stays_and_time_is_linear(name: str) -> None:
    engine = Engine(model_of(name))
    tokens_T = tokens(131_073)[0].numpy()
    long_context.read_carried(engine, tokens_T[:2049], chunk=1024)
    short = long_context.read_carried(engine, tokens_T[:8193], chunk=1024).marks[-1]
    marks = long_context.read_carried(engine, tokens_T, chunk=1024).marks
    assert marks[-1].length == 131_072
    if short.peak_bytes is not None:
        assert marks[-1].peak_bytes is not None
        assert marks[-1].peak_bytes < 1.1 * short.peak_bytes
    assert marks[-1].state_bytes + marks[-1].cache_bytes == short.state_bytes + short.cache_bytes
    # the machine is shared with other tests: the half that it is fastest in
    speeds = np.array([mark.tokens_per_second for mark in marks if mark.length > 1024])
    assert speeds[-1] > 0.6 * speeds.max()
