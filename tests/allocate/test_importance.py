"""KL when one layer is changed: zero where it does nothing, and nothing stays changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.allocate.small import tiny
from valkyrie_core.allocate import importance
from valkyrie_core.allocate.importance import (
    Windows,
    bootstrap,
    changed,
    measure,
    text_windows,
)
from valkyrie_core.allocate.match import layers_of
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.attention import Attention
from valkyrie_core.nn.model import HybridLM


@pytest.fixture
def model(tmp_path: Path) -> HybridLM:
    torch.manual_seed(0)
    model = HybridLM(tiny(tmp_path).model)
    for name, parameter in model.named_parameters():
        # outputs start at zero: then no layer does anything yet
        if name.endswith(("output.weight", "down.weight", "ffn.value.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
        if name == "embedding.weight":
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def text(model: HybridLM) -> Windows:
    tokens_WT = torch.randint(0, model.embedding.num_embeddings, (6, 24))
    return Windows(tokens_WT, torch.zeros_like(tokens_WT))


def test_a_layer_that_does_nothing_is_worth_nothing(model: HybridLM, text: Windows) -> None:
    with torch.no_grad():
        attention = layers_of(model)[1].mixer
        assert isinstance(attention, Attention)
        attention.output.weight.zero_()
    found = {(x.layer, x.change): x for x in measure(model, text, window=4)}
    assert set(found) == {(0, "removed"), (1, "removed"), (1, "windowed")}
    for change in ("removed", "windowed"):
        assert found[1, change].kl == pytest.approx(0, abs=1e-6)  # type: ignore[index]
    assert found[0, "removed"].kl > 1e-5
    assert found[0, "removed"].low <= found[0, "removed"].kl <= found[0, "removed"].high


def test_kl_is_the_formula_s(model: HybridLM, text: Windows) -> None:
    found = {(x.layer, x.change): x.kl for x in measure(model, text, window=4)}
    state = model.init_state(6)
    with torch.no_grad():
        p = model(text.tokens_WT, state, text.doc_WT).logits_BTV.double().softmax(-1)
        with changed(layers_of(model)[1], "windowed", 4):
            q = model(text.tokens_WT, state, text.doc_WT).logits_BTV.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert found[1, "windowed"] == pytest.approx(expected.item(), rel=1e-3)


def test_kl_does_not_depend_on_how_much_is_compared_at_once(
    model: HybridLM, text: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(model, text, window=4)
    monkeypatch.setattr(importance, "LOGITS_AT_ONCE", 7 * model.head.out_features)
    assert [x.kl for x in measure(model, text, window=4)] == pytest.approx([x.kl for x in whole])


def test_nothing_stays_changed(model: HybridLM, text: Windows) -> None:
    before = [layer.mixer for layer in layers_of(model)]
    attention = before[1]
    assert isinstance(attention, Attention)
    state = model.init_state(6)
    with torch.no_grad():
        expected = model(text.tokens_WT, state).logits_BTV
    measure(model, text, window=4)
    assert [layer.mixer for layer in layers_of(model)] == before
    assert attention.window is None
    assert attention.sinks == 0
    with torch.no_grad():
        assert torch.equal(model(text.tokens_WT, state).logits_BTV, expected)
    with pytest.raises(RuntimeError), changed(layers_of(model)[0], "removed", 4):
        raise RuntimeError
    assert layers_of(model)[0].mixer is before[0]


def test_wider_windows_change_less(model: HybridLM, text: Windows) -> None:
    kl = [
        next(x.kl for x in measure(model, text, window=window) if x.change == "windowed")
        for window in (1, 8, 19)
    ]
    assert kl[0] > kl[1] > kl[2] > 0


def test_a_window_as_long_as_the_text_is_refused(model: HybridLM, text: Windows) -> None:
    with pytest.raises(UsageError, match="changes nothing"):
        measure(model, text, window=24)


def test_windows_of_text_do_not_overlap(tmp_path: Path) -> None:
    dataset = prepare(tiny(tmp_path).data, cache=tmp_path / "cache")
    windows = text_windows(dataset, 16, 5)
    whole = torch.tensor(dataset.corpora["plays"].validation.tokens.astype("int64"))
    assert windows.tokens_WT.shape == (5, 16)
    assert torch.equal(windows.tokens_WT[0], whole[:16])
    assert len({tuple(row) for row in windows.tokens_WT.tolist()}) == 5
    with pytest.raises(UsageError, match="no held-out text"):
        text_windows(dataset, 100_000)


def test_the_bootstrap_knows_a_constant() -> None:
    assert bootstrap(torch.full((8,), 2.0).double().numpy()) == (2.0, 2.0)
