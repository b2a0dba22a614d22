"""Watching routers: the counts are the layers' own, padding is nobody's, text is read once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.nn.menu import MOES, VOCAB, awake, model_config
from valkyrie_core.data.byte_tokenizer import BytesTokenizer
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import UsageError
from valkyrie_core.experts import measures
from valkyrie_core.experts.history import dead_steps, load_history
from valkyrie_core.experts.observe import moe_layers, observe
from valkyrie_core.experts.summary import grouped_loads
from valkyrie_core.experts.text import Source, Text, cut, of_document, part, shown, window_length
from valkyrie_core.nn.model import IGNORED


def some_text(name: str = "a", windows: int = 6, length: int = 12, seed: int = 0) -> Text:
    """Random tokens; the last window is half padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens_WT = torch.randint(0, VOCAB, (windows, length + 1), generator=generator)
    doc_WT = torch.ones(windows, length, dtype=torch.int64)
    doc_WT[-1, length // 2 :] = -1
    targets_WT = tokens_WT[:, 1:].masked_fill(doc_WT < 0, IGNORED)
    return Text(name, tokens_WT[:, :-1], targets_WT, doc_WT)


@pytest.mark.parametrize("ffn", MOES)
def test_loads_are_what_the_layers_tell(ffn: str) -> None:
    model = awake(model_config("rwkv7", ffn))
    text = some_text()
    trace = observe(model, [text])
    with torch.no_grad():
        told = model(text.tokens_WT, model.init_state(6), text.doc_WT).told
    expected = [routed.load_E.long().tolist() for routed in told.routed]
    layers = moe_layers(model)
    assert set(trace.layers) == set(layers)
    found = [
        measures.loads(experts_RK, layers[index].config.num_experts).tolist()
        for index, layer in trace.layers.items()
        for experts_RK in layer.experts_CRK
    ]
    assert found == expected
    assert len(trace.tokens_R) == text.num_tokens == 6 * 12 - 6


def test_entropy_and_margin_by_formula() -> None:
    model = awake(model_config("attention", "moe-sigmoid", layers=1))
    text = some_text()
    trace = observe(model, [text])
    with torch.no_grad():
        (routed,) = model(text.tokens_WT, model.init_state(6), text.doc_WT).told.routed
    affinity = routed.logits_RE[text.doc_WT.flatten() >= 0].sigmoid()
    p = affinity / affinity.sum(1, keepdim=True)
    ranked = p.sort(descending=True).values
    assert trace.layers[0].entropy == pytest.approx(float(-(p * p.log()).sum(1).mean()))
    assert trace.layers[0].margin == pytest.approx(float((ranked[:, 0] - ranked[:, 1]).mean()))
    assert 0 < trace.layers[0].entropy < math.log(6)


def test_domains_windows_and_batches() -> None:
    model = awake(model_config("attention", "moe", layers=1))
    told: list[tuple[str, int, int]] = []
    texts = [some_text("a"), some_text("b", windows=3, seed=1)]
    trace = observe(model, texts, told=lambda *args: told.append(args))
    assert trace.domain_W.tolist() == [0] * 6 + [1] * 3
    # six windows are a batch of four and one of two
    assert np.unique(trace.batch_R).tolist() == [0, 1, 2]
    assert np.bincount(trace.window_R).tolist() == [12] * 5 + [6] + [12] * 2 + [6]
    assert np.unique(trace.batch_R[trace.window_R < 4]).tolist() == [0]
    assert told[-1] == ("text", 66 + 30, 66 + 30)
    counts_WE = grouped_loads(trace.layers[0].experts_RK, trace.window_R, 5)
    assert counts_WE.sum(1).tolist() == [24] * 5 + [12] + [24] * 2 + [12]
    assert counts_WE.sum(0).tolist() == measures.loads(trace.layers[0].experts_RK, 5).tolist()


def test_a_window_is_routed_as_it_is_alone() -> None:
    model = awake(model_config("rwkv7", "moe-top-p"))
    text = some_text()
    whole = observe(model, [text])
    alone = observe(model, [Text("a", *(x_WT[2:3] for x_WT in text[1:]))])
    for index, layer in alone.layers.items():
        rows = whole.window_R == 2
        assert (whole.layers[index].experts_RK[rows] == layer.experts_RK).all()


def test_windows_are_spread_and_do_not_overlap() -> None:
    # ten documents of ten tokens, each with its marker
    tokens = np.arange(100) % 10 + NUM_RESERVED
    tokens[::10] = 1
    source = Source("a", tokens, np.arange(0, 101, 10))
    text = cut(source, 15, 45)
    assert text.tokens_WT.shape == (3, 15)
    assert text.num_tokens == 45
    # 1 and 2, 4 and 5, 8 and 9
    assert text.num_documents == 6
    starts = [0, 30, 75]
    for row, start in enumerate(starts):
        assert text.tokens_WT[row].tolist() == tokens[start : start + 15].tolist()
        targets = tokens[start + 1 : start + 16]
        expected = np.where(targets == 1, IGNORED, targets)
        assert text.targets_WT[row].tolist() == expected.tolist()
        assert text.doc_WT[row].tolist() == [1 + i // 10 for i in range(start, start + 15)]
    assert part(text, 2).tokens_WT[:, 0].tolist() == [tokens[0], tokens[75]]
    assert len(part(text, 9).tokens_WT) == 3


def test_a_short_text_is_one_padded_window() -> None:
    text = cut(of_document("a", np.array([1, 8, 9])), 6, 100)
    assert text.tokens_WT.tolist() == [[1, 8, 0, 0, 0, 0]]
    assert text.targets_WT.tolist() == [[8, 9, *[IGNORED] * 4]]
    assert text.doc_WT.tolist() == [[1, 1, -1, -1, -1, -1]]
    with pytest.raises(UsageError, match="no token"):
        cut(of_document("a", np.array([1])), 6, 100)


def test_what_is_not_scored_is_not_predicted() -> None:
    scored = np.array([0, 0, 1, 1], dtype=np.uint8)
    text = cut(Source("a", np.array([1, 8, 9, 7]), np.array([0, 4]), scored), 3, 3)
    assert text.targets_WT.tolist() == [[IGNORED, 9, 7]]


def test_windows_are_shortened_until_there_are_some() -> None:
    assert window_length(512, 16_384) == 512
    assert window_length(4096, 16_384) == 1024
    assert window_length(512, 1600) == 100
    assert window_length(512, 100) == 32
    assert window_length(512, 10) == 10


def test_tokens_are_shown_escaped() -> None:
    tokenizer = BytesTokenizer()

    def of(byte: int) -> str:
        return shown(tokenizer, NUM_RESERVED + byte)

    assert [of(ord("a")), of(ord("<")), of(10), of(27), of(0xFF)] == [
        *("a", "<", "\\n", "\\x1b", "\\xff"),
    ]
    assert shown(tokenizer, 1) == "<|doc|>"
    assert shown(tokenizer, 0) == "<unk>"


def test_dead_steps_are_read_from_the_metrics() -> None:
    def row(step: int, *load: int) -> dict[str, object]:
        return {"kind": "train", "step": step, "load": {"1": list(load)}}

    rows = [row(5, 4, 4, 0), row(10, 5, 3, 0), row(15, 8, 0, 0), row(20, 8, 0, 0), row(25, 0, 0, 8)]
    rows += [{"kind": "val", "step": 20}, {"kind": "train", "step": 20}, row(20, 1, 1)]
    history = load_history(rows, {0: 3, 1: 3}, last_step=20)
    assert set(history) == {1}
    assert history[1].steps_S.tolist() == [5, 10, 15, 20]
    assert history[1].share_SE[0].tolist() == [1.5, 1.5, 0]
    assert [dead_steps(history[1], expert) for expert in range(3)] == [0, 10, 20]
    assert dead_steps(history.get(0), 0) is None
