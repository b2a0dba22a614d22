"""Depths and halting on the held-out questions of a trained run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from valkyrie_core.data.dataset import DataConfig, prepare
from valkyrie_core.data.packing import PackedSplit, chosen
from valkyrie_core.errors import UsageError
from valkyrie_core.evaluate.answers import right_answers
from valkyrie_core.evaluate.confidence import calibration_error, confidences
from valkyrie_core.evaluate.rules import QHaltConfig, full_depth, looping, rule_of
from valkyrie_core.evaluate.thinking import by_depth, said_by, think
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.halting import ArgmaxConfig, ConfidenceConfig, KLConfig, LatentConfig
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.models import Model, build_model

ATTENTION = {"mixer": {"type": "attention", "num_heads": 2}, "ffn": {"type": "swiglu"}}
CORES: dict[str, dict[str, Any]] = {
    "loops": {
        "type": "recursive",
        "blocks": {"attn": ATTENTION},
        "pattern": ["attn"],
        "loops": 4,
        "halting": {"type": "confidence"},
    },
    "canvas": {
        "type": "canvas",
        "blocks": {"attn": ATTENTION},
        "pattern": ["attn"],
        "cells": 20,
        "h_cycles": 1,
        "l_cycles": 1,
        "halt_max_steps": 4,
    },
    "q_learning": {
        "type": "canvas",
        "blocks": {"attn": ATTENTION},
        "pattern": ["attn"],
        "cells": 20,
        "h_cycles": 1,
        "l_cycles": 1,
        "halt_max_steps": 3,
        "halting": {"type": "q_learning"},
    },
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PackedSplit:
    khop = {
        "type": "questions",
        "task": {"type": "khop", "symbols": 4, "hops": [1, 2]},
        "examples": 20,
        "validation_examples": 24,
        "holdout": {"type": "questions", "fraction": 0.5},
    }
    tree = {"corpora": {"khop": khop}, "tokenizer": {"type": "bytes"}}
    cache = tmp_path_factory.mktemp("cache")
    return prepare(DataConfig.model_validate(tree), cache=cache).corpora["khop"].validation


def model_of(name: str, **core: Any) -> Model:
    tree = {"vocab_size": 261, "dim": 16, "core": {**CORES[name], **core}}
    torch.manual_seed(3)
    model = build_model(ModelConfig.model_validate(tree))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.mark.parametrize("name", CORES)
def test_full_depth_is_what_the_answers_are(name: str, split: PackedSplit) -> None:
    model = model_of(name)
    found = think(model, split, context_len=16)
    assert found.right == right_answers(model, split, context_len=16)
    assert set(found.steps) == {full_depth(model)}
    assert found.seconds > 0


@pytest.mark.parametrize("name", ["loops", "canvas"])
def test_a_depth_is_that_of_a_model_that_never_goes_deeper(name: str, split: PackedSplit) -> None:
    model = model_of(name)
    key = "loops" if name == "loops" else "halt_max_steps"
    shallow = model_of(name, **{key: 2})
    tensors = {k: v for k, v in model.state_dict().items() if k != "core.keep_LD"}
    shallow.load_state_dict(tensors, strict=False)
    if name == "loops":
        with torch.no_grad():
            shallow.core.keep_LD.copy_(model.core.keep_LD[:2])  # type: ignore[union-attr]
    assert think(model, split, depth=2, context_len=64).right == (
        think(shallow, split, context_len=64).right
    )
    assert think(model, split, depth=1, context_len=64).steps.keys() == {1}
    shares = by_depth(model, split, 5, context_len=64)
    for depth, share in shares.items():
        assert share == think(model, split, depth=depth, context_len=64).share
    assert list(shares) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize(
    "rule",
    [LatentConfig(threshold=1e-9), KLConfig(threshold=1e-15), ConfidenceConfig(threshold=1 - 1e-9)],
    ids=lambda rule: rule.type,
)
def test_a_rule_that_never_holds_changes_nothing(name: str, rule: Any, split: PackedSplit) -> None:
    model = model_of(name)
    full, found = (think(model, split, rule=one, context_len=64) for one in (None, rule))
    assert found.right == full.right
    assert found.steps.keys() == {full_depth(model)}


@pytest.mark.parametrize("name", CORES)
def test_a_rule_that_always_holds_is_the_least_depth(name: str, split: PackedSplit) -> None:
    model = model_of(name)
    rule = LatentConfig(threshold=1e9, min_loops=2)
    found = think(model, split, rule=rule, context_len=64)
    if name == "loops":
        # the first token of a document goes on to the last loop
        assert found.steps[4] == split.num_documents
        assert set(found.steps) == {2, 4}
        return
    assert found.right == think(model, split, depth=2, context_len=64).right
    assert set(found.steps) == {2}


def test_after_a_rule_the_model_is_as_it_was(split: PackedSplit) -> None:
    model = model_of("loops")
    assert isinstance(model, HybridLM)
    before = right_answers(model, split, context_len=64)
    own = model.core.halting  # type: ignore[union-attr]
    think(model, split, rule=LatentConfig(threshold=9.0), depth=7, context_len=64)
    assert model.core.loops == 4  # type: ignore[union-attr]
    assert model.core.halting is own  # type: ignore[union-attr]
    assert right_answers(model, split, context_len=64) == before


def test_confidences_of_a_canvas_are_of_every_step(split: PackedSplit) -> None:
    model = model_of("canvas")
    found = confidences(model, split, context_len=64)
    assert found is not None
    assert found.said.shape == (4 * split.num_documents,)
    assert found.going_on is None
    # one group of questions: step after step
    count = split.num_documents
    for step in range(4):
        right = think(model, split, depth=step + 1, context_len=64).right
        assert int(found.held[step * count : (step + 1) * count].sum()) == sum(right)
    learned = confidences(model_of("q_learning"), split, context_len=64)
    assert learned is not None
    assert learned.going_on is not None
    assert learned.going_on.shape == learned.said.shape


def test_confidences_of_loops_are_of_every_scored_token(split: PackedSplit) -> None:
    model = model_of("loops")
    found = confidences(model, split, context_len=64)
    assert found is not None
    # an answer and its end, after all loops but the last
    assert found.said.shape == (3 * 2 * split.num_documents,)
    assert confidences(model_of("loops", halting={"type": "kl"}), split, context_len=64) is None


def test_the_calibration_error_by_hand() -> None:
    said = torch.tensor([0.92, 0.98, 0.15, 0.11], dtype=torch.float64)
    held = torch.tensor([True, False, False, False])
    expected = (2 * abs(0.95 - 0.5) + 2 * abs(0.13 - 0.0)) / 4
    assert calibration_error(said, held) == pytest.approx(expected)
    assert calibration_error(torch.ones(3).double(), torch.ones(3).bool()) == 0


def test_what_is_said_with_a_rule_and_without(split: PackedSplit) -> None:
    model = model_of("loops")
    assert isinstance(model, HybridLM)
    full = said_by(model, split, context_len=16)
    never = said_by(model, split, rule=KLConfig(threshold=1e-15), context_len=64)
    early = said_by(model, split, rule=LatentConfig(threshold=1e9), context_len=64)
    assert full.differs(never) == [0.0] * split.num_documents
    assert set(full.differs(early)) <= {0.0, 0.5, 1.0}
    assert [len(own) for own in full.tokens] == [2] * split.num_documents


def test_rules_by_name() -> None:
    assert rule_of("kl=0.5") == KLConfig(threshold=0.5)
    assert rule_of("argmax=3", min_depth=2) == ArgmaxConfig(patience=3, min_loops=2)
    assert rule_of("confidence") == ConfidenceConfig()
    assert rule_of("q_halt") == QHaltConfig()


@pytest.mark.parametrize("text", ["", "entropy", "kl=x", "argmax=1", "confidence=2", "q_halt=1"])
def test_wrong_rules_are_told(text: str) -> None:
    with pytest.raises(UsageError, match="rule of halting"):
        rule_of(text)


def test_what_a_model_has_not_learned_can_t_be_asked() -> None:
    model = model_of("loops", halting={"type": "kl"})
    assert isinstance(model, HybridLM)
    with pytest.raises(UsageError, match="no confidence"), looping(model, ConfidenceConfig(), None):
        pass
    with pytest.raises(UsageError, match="a canvas's"), looping(model, QHaltConfig(), None):
        pass
    coda = model_of("loops", halting=None, coda=["attn"])
    assert isinstance(coda, HybridLM)
    with pytest.raises(UsageError, match="coda"), looping(coda, KLConfig(), None):
        pass


def test_chosen_documents_are_a_split_of_their_own(split: PackedSplit) -> None:
    some = chosen(split, [3, 0, 5])
    assert some.names == [split.names[one] for one in (3, 0, 5)]
    for index, one in enumerate((3, 0, 5)):
        assert some.document_tokens(index).tolist() == split.document_tokens(one).tolist()
    assert some.counts.tokens == len(some.tokens)
    cut = chosen(split, [3, 0], max_tokens=4)
    assert cut.doc_starts.tolist() == [0, 4, 8]
    assert cut.document_tokens(1).tolist() == split.document_tokens(0).tolist()[:3]
