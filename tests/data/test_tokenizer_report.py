from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.helpers import documents, write_stories
from tests.data.test_dataset import chat_corpus, config
from valkyrie_core.data import tokenizer_report
from valkyrie_core.data.byte_tokenizer import BytesTokenizer
from valkyrie_core.data.tokenizer import load_tokenizer
from valkyrie_core.data.tokenizer_report import comes_back, embedding_parameters, score_documents


@pytest.fixture
def values(tmp_path: Path) -> Any:
    write_stories(tmp_path / "texts", 20)
    corpora = config(tmp_path).model_dump()["corpora"] | {"chat": chat_corpus(tmp_path)}
    return config(tmp_path, corpora=corpora, tokenizer={"type": "sentencepiece", "vocab_size": 300})


def test_build_writes_what_train_finds(tmp_path: Path, values: Any, monkeypatch: Any) -> None:
    built = tokenizer_report.build(values, tmp_path / "out", cache=tmp_path / "cache")
    assert built.documents > 20
    assert built.seconds > 0
    assert load_tokenizer(tmp_path / "out").fingerprint == built.tokenizer.fingerprint
    again = tokenizer_report.build(values, tmp_path / "again", cache=tmp_path / "cache")
    assert again.tokenizer.fingerprint == built.tokenizer.fingerprint
    monkeypatch.setattr(
        "valkyrie_core.data.dataset.build_tokenizer", lambda *_: pytest.fail("trained again")
    )
    found, _ = tokenizer_report.read_with_tokenizer(values, cache=tmp_path / "cache")
    assert found.fingerprint == built.tokenizer.fingerprint


def test_building_bytes_reads_nothing(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 3)
    built = tokenizer_report.build(config(tmp_path), tmp_path / "out", cache=tmp_path / "cache")
    assert (built.documents, built.tokenizer.kind) == (0, "bytes")


def test_evaluation_counts_every_document(tmp_path: Path, values: Any) -> None:
    result = tokenizer_report.evaluate(values, cache=tmp_path / "cache")
    assert result.exact
    assert all(result.hostile.values())
    stories = result.corpora["stories"]
    assert stories.together.documents == stories.together.round_trips == 20
    assert stories.train.documents + stories.validation.documents == 20
    assert stories.together.bytes == sum(len(d.text.encode()) for d in documents(20))
    assert 1 < (stories.together.bytes_per_token or 0) < 8
    assert result.corpora["chat"].together.documents == 10


def test_a_lossy_tokenizer_is_found_out() -> None:
    class Lossy(BytesTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.replace("Story 3", "Story 4"))

    score = score_documents(Lossy(), documents(6))
    assert (score.documents, score.round_trips) == (6, 5)


def test_a_tokenizer_that_makes_special_tokens_is_found_out() -> None:
    class Injectable(BytesTokenizer):
        def encode(self, text: str) -> list[int]:
            return [1] if text == "<|doc|>" else super().encode(text)

        def decode(self, tokens: Any) -> str:
            return "<|doc|>" if list(tokens) == [1] else super().decode(tokens)

    assert comes_back(BytesTokenizer(), "<|doc|>")
    assert not comes_back(Injectable(), "<|doc|>")


def test_bytes_are_one_to_one() -> None:
    score = score_documents(BytesTokenizer(), documents(4))
    assert score.bytes_per_token == 1.0
    assert score_documents(BytesTokenizer(), []).bytes_per_token is None


def test_the_cost_in_parameters() -> None:
    assert embedding_parameters(1000, 64, "linear") == 128_000
    assert embedding_parameters(1000, 64, "tied") == 64_000
