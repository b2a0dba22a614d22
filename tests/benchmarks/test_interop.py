"""Others who run our RWKV-7 weights find our scores: a sharp test of both."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks import models, runners
from benchmarks.decode import distance
from benchmarks.models import PURE, TINY
from valkyrie_core.infer.engine import Engine
from valkyrie_core.nn.model import HybridLM

PROMPT = models.tokens(TINY, 1, 50)[0].tolist()
PEERS = {
    "llama.cpp f32": (partial(runners.llama_cpp, format="f32"), 1e-5),
    "llama.cpp bf16": (partial(runners.llama_cpp, format="bf16"), 0.02),
    "llama.cpp q8_0": (partial(runners.llama_cpp, format="q8_0", repack=False), 0.02),
    "rwkv fp32": (partial(runners.rwkv_package, precision="fp32"), 1e-5),
    "rwkv bf16": (partial(runners.rwkv_package, precision="bf16"), 0.03),
}


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return models.build(TINY, PURE).eval()


@pytest.mark.parametrize("name", PEERS)
def test_scores_agree(model: HybridLM, name: str) -> None:
    make, bound = PEERS[name]
    expected_V = runners.ours(Engine(model)).read(PROMPT)
    try:
        runner = make(model)
    except runners.AbsentError as error:
        pytest.skip(str(error))
    assert distance(runner.read(PROMPT), expected_V) < bound
    # a short one, then the long one again: nothing is left over from an earlier prompt
    assert distance(runner.read(PROMPT[:9]), expected_V) > bound
    assert distance(runner.read(PROMPT), expected_V) < bound
