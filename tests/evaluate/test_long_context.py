"""Reading long texts: any chunk gives one answer, contexts score the same targets, memory stays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.nn.menu import VOCAB, awake, hybrid_config, model_config
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import DivergedError, StoppedError
from valkyrie_core.evaluate import long_context as long
from valkyrie_core.evaluate.long_page import long_page
from valkyrie_core.infer.engine import Engine
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.report import ContextScore, EffectiveContext, LongContextReport

LENGTHS = np.where(np.arange(VOCAB) < NUM_RESERVED, 0, 3)


def engine_of(config: ModelConfig) -> Engine:
    model = awake(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # far from saturation, so that errors are not hidden
            parameter.mul_(0.7)
    return Engine(model)


def text(length: int, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return generator.integers(NUM_RESERVED, VOCAB, length)


def test_contexts_double_up_to_the_longest() -> None:
    assert long.context_lengths(1000) == [256, 512, 1000]
    assert long.context_lengths(1024) == [256, 512, 1024]
    assert long.context_lengths(100) == [100]


@pytest.mark.parametrize("pattern", ["rra", "r"])
def test_any_chunk_reads_the_same(pattern: str) -> None:
    engine = engine_of(hybrid_config(pattern))
    tokens_T = text(1201)
    whole = long.read_carried(engine, tokens_T, chunk=5000).nats_T
    assert whole.shape == (1200,)
    for chunk in (7, 100, 512):
        found = long.read_carried(engine, tokens_T, chunk=chunk).nats_T
        np.testing.assert_allclose(found, whole, atol=1e-4)


def test_what_is_read_carried_is_what_the_model_says() -> None:
    engine = engine_of(hybrid_config())
    tokens_T = text(300)
    ids = torch.from_numpy(tokens_T)[None]
    out = engine.model(ids[:, :-1], engine.model.init_state(1))
    expected = torch.nn.functional.cross_entropy(
        out.logits_BTV[0], ids[0, 1:], reduction="none"
    ).detach()
    found = long.read_carried(engine, tokens_T, chunk=64).nats_T
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_every_context_scores_the_same_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "SHORTEST", 16)
    monkeypatch.setattr(long, "STRETCH", 8)
    engine = engine_of(hybrid_config())
    tokens_T = text(120)
    found = long.read_by_context(
        engine, tokens_T, LENGTHS, contexts=long.context_lengths(64), stretches=3
    )
    assert found.contexts == [16, 32, 64]
    assert found.bytes_M.tolist() == [24, 24, 24]
    for row, context in enumerate(found.contexts):
        for column, anchor in enumerate((64, 87, 111)):
            ids = torch.from_numpy(tokens_T[anchor - context : anchor + 9])[None]
            out = engine.model(ids[:, :-1], engine.model.init_state(1))
            expected = torch.nn.functional.cross_entropy(
                out.logits_BTV[0, -8:], ids[0, -8:], reduction="sum"
            )
            assert found.nats_CM[row, column] == pytest.approx(expected.item(), abs=1e-4)
    total = found.nats_CM.sum(axis=1) / math.log(2) / 72
    np.testing.assert_allclose(found.bits_per_byte(), total)


def test_a_text_that_is_too_short_is_told() -> None:
    engine = engine_of(hybrid_config())
    with pytest.raises(ValueError, match="too few"):
        long.read_by_context(engine, text(300), LENGTHS, contexts=long.context_lengths(256))


def test_effective_length_is_where_the_loss_is_lowest() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, (4, 8))
    nats = np.array([4.0, 3.0, 2.0, 2.5])[:, None] + noise
    found = long.ByContext([256, 512, 1024, 2048], nats, np.ones(8))
    assert long.effective_length(found) == (1024, 1024, 1024)
    # small steps that add up count, none of which is sure
    step = np.array([0.0, 0.5, -0.2, 0.5, -0.2, 0.5, -0.2, 0.5])
    slow = np.stack([8.0 + 0 * step, 8.0 - step, 7.8 - 2 * step, 7.0 - 3 * step])
    assert long.effective_length(long.ByContext(found.contexts, slow, np.ones(8))).tokens == 2048
    # where nothing is certain, the interval says so
    torn = np.zeros((4, 8))
    torn[0, ::2] = torn[3, 1::2] = -1
    flat = long.ByContext([256, 512, 1024, 2048], torn, np.ones(8))
    assert long.effective_length(flat) == (256, 256, 2048)


def test_few_targets_are_not_scored_twice_and_claim_nothing() -> None:
    engine = engine_of(hybrid_config("r"))
    found = long.read_by_context(
        engine, text(256 + 128 + 1 + 100), LENGTHS, contexts=long.context_lengths(256)
    )
    assert found.nats_CM.shape == (1, 1)
    one = long.ByContext([256, 512], np.array([[3.0], [2.0]]), np.ones(1))
    assert long.effective_length(one) == (256, 256, 512)


def test_positions_are_bucketed_and_markers_have_no_bytes() -> None:
    tokens_T = text(1001)
    tokens_T[1:257] = 0
    nats_T = np.full(1000, 3 * math.log(2))
    nats_T[:256] = 0
    buckets = long.by_position(nats_T, tokens_T, LENGTHS)
    assert [(start, end) for start, end, _ in buckets] == [(0, 256), (256, 512), (512, 1000)]
    assert buckets[0][2] is None
    assert buckets[1][2] == pytest.approx(1.0)


def test_the_cost_is_told_by_length() -> None:
    marks = long.read_carried(engine_of(hybrid_config()), text(1025), chunk=100).marks
    assert [mark.length for mark in marks] == [256, 512, 1024]
    assert len({mark.state_bytes for mark in marks}) == 1
    assert marks[0].cache_bytes < marks[2].cache_bytes
    pure = long.read_carried(engine_of(hybrid_config("r")), text(1025), chunk=100).marks
    assert [mark.cache_bytes for mark in pure] == [0, 0, 0]
    windowed = engine_of(model_config("attention-window"))
    last = long.read_carried(windowed, text(4097), chunk=64).marks[-2:]
    assert last[0].cache_bytes == last[1].cache_bytes


def test_damaged_weights_and_stops_are_told() -> None:
    engine = engine_of(hybrid_config())
    with pytest.raises(StoppedError):
        long.read_carried(engine, text(600), chunk=64, stop=lambda: True)
    broken: HybridLM = engine.model
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(DivergedError):
        long.read_carried(engine, text(600), chunk=64)


@pytest.mark.parametrize(
    ("contexts", "stretches", "best", "words"),
    [
        ([256], 8, 256, "nothing to compare"),
        ([256, 512], 1, 256, "nothing to compare"),
        ([256, 512], 8, 256, "No context longer than 256 tokens is surely better"),
        ([256, 512], 8, 512, "More context surely helps up to 512 tokens"),
    ],
)
def test_no_more_is_claimed_than_was_measured(
    contexts: list[int], stretches: int, best: int, words: str
) -> None:
    report = LongContextReport(
        by_position=[],
        by_context=[ContextScore(context=length, bpb=2.0) for length in contexts],
        targets=128 * stretches,
        stretches=stretches,
        effective_length=EffectiveContext(tokens=best, low=256, high=512),
        recall=[],
        memory=[],
        run="r",
        step=1,
        parameters=1,
        text="t",
        text_tokens=1,
        context=contexts[-1],
        trained_context=1,
        chunk=1,
        precision="fp32",
        weights="fp32",
        seconds=0.0,
    )
    assert words in report.how_far
    assert words in long_page(report, "p.png", "valkyrie eval")
