from __future__ import annotations

import logging
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.evaluate.splits import TOKENIZER, chat, pack, texts
from tests.nn.menu import awake, hybrid_config
from valkyrie_core.data.dataset import Dataset, PackedCorpus
from valkyrie_core.evaluate import corpora
from valkyrie_core.evaluate.baselines import (
    Baselines,
    byte_counts,
    compressed_size,
    first_bytes,
    measure_baselines,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)

PIECES = [TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)]
TRAIN = ("the quick brown fox jumps over the lazy dog. " * 30, "Zwölf Boxkämpfer. " * 20)
HELD = ("the lazy dog jumps over the quick brown fox. " * 4, "Zwölf. ")


def bytes_of(*contents: str) -> bytes:
    return "".join(contents).encode()


def test_unigram_is_add_one_over_the_training_bytes() -> None:
    train, held = np.zeros(256, np.int64), np.zeros(256, np.int64)
    train[[65, 66]] = [3, 1]
    held[[65, 67]] = [2, 1]
    # 4 of 260 for A, 1 of 260 for C
    expected = (2 * math.log2(260 / 4) + math.log2(260)) / 3
    assert unigram_bits_per_byte(train, held) == pytest.approx(expected, abs=1e-12)


def test_unigram_without_training_text_is_uniform() -> None:
    held = np.zeros(256, np.int64)
    held[7] = 5
    assert unigram_bits_per_byte(np.zeros(256, np.int64), held) == pytest.approx(8)
    with pytest.raises(ValueError, match="no validation text"):
        unigram_bits_per_byte(held, np.zeros(256, np.int64))


def test_bytes_are_counted_through_tokens(tmp_path: Path) -> None:
    split = pack(tmp_path / "s", texts(*TRAIN))
    counted = Counter(bytes_of(*TRAIN))
    counts = byte_counts(split, PIECES, scored_only=True)
    assert {value: int(n) for value, n in enumerate(counts) if n} == counted
    assert counts.sum() == split.doc_bytes.sum()


def test_counting_in_parts_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = pack(tmp_path / "s", [chat(("user", "abc"), ("assistant", "défg"))] * 3)
    whole = byte_counts(split, PIECES, scored_only=True)
    monkeypatch.setattr("valkyrie_core.evaluate.baselines.TOKENS_AT_ONCE", 4)
    assert byte_counts(split, PIECES, scored_only=True).tolist() == whole.tolist()
    assert whole[ord("a")] == 0
    assert whole[ord("g")] == 3


def test_first_bytes(tmp_path: Path) -> None:
    split = pack(tmp_path / "s", texts("one", "é2", "three"))
    assert first_bytes(split, PIECES, 100, scored_only=True) == "oneé2three".encode()
    assert first_bytes(split, PIECES, 4, scored_only=True) == "oneé".encode()[:4]
    conversation = pack(tmp_path / "c", [chat(("user", "abc"), ("assistant", "de"))])
    assert first_bytes(conversation, PIECES, 100, scored_only=True) == b"de"
    assert first_bytes(conversation, PIECES, 100, scored_only=False) == b"abcde"


def test_xz_given_the_training_text_knows_it() -> None:
    # incompressible by itself, known from training
    secret = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    assert xz_bits_per_byte(secret) > 8
    assert xz_bits_per_byte(secret, b"x" + secret) < 0.2
    size = len(lzma.compress(secret, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(secret) == pytest.approx(8 * size / 5000, abs=0.01)


def test_the_dictionary_spans_the_whole_text() -> None:
    block = np.random.default_rng(1).integers(0, 256, 300_000).astype(np.uint8).tobytes()
    # the repetition is 300 kB away: a small dictionary would not see it
    assert compressed_size(block + block) < 1.01 * compressed_size(block)


def test_all_baselines_of_one_corpus(tmp_path: Path) -> None:
    training, validation = pack(tmp_path / "t", texts(*TRAIN)), pack(tmp_path / "v", texts(*HELD))
    measured = measure_baselines(training, validation, TOKENIZER)
    train, held = bytes_of(*TRAIN), bytes_of(*HELD)
    assert measured.uniform == 8
    assert measured.xz.bpb == pytest.approx(8 * compressed_size(held) / len(held))
    together = compressed_size(train + held) - compressed_size(train)
    assert measured.xz_given_training.bpb == pytest.approx(8 * together / len(held))
    assert measured.xz_given_training.bpb < measured.xz.bpb < measured.uniform
    assert measured.unigram < measured.uniform
    assert measured.xz_given_training.training_bytes == len(train)
    assert measured.xz.training_bytes == 0


def test_chat_baselines_are_about_the_answers(tmp_path: Path) -> None:
    training = pack(tmp_path / "t", [chat(("user", "q" * 500), ("assistant", "ab"))])
    validation = pack(tmp_path / "v", [chat(("user", "zz"), ("assistant", "a"))])
    measured = measure_baselines(training, validation, TOKENIZER)
    # a was seen once in two bytes of answers, whatever the questions hold
    assert measured.unigram == pytest.approx(math.log2(258 / 2))
    assert measured.xz.validation_bytes == 1
    assert measured.xz_given_training.training_bytes == 502


def test_a_limit_is_never_silent(tmp_path: Path) -> None:
    training, validation = pack(tmp_path / "t", texts(*TRAIN)), pack(tmp_path / "v", texts(*HELD))
    limited = measure_baselines(
        training, validation, TOKENIZER, max_training_bytes=100, max_validation_bytes=50
    ).xz_given_training
    assert (limited.training_bytes, limited.validation_bytes) == (100, 50)
    assert limited.training_bytes_total == len(bytes_of(*TRAIN))
    assert limited.validation_bytes_total == len(bytes_of(*HELD))


class TestCorpora:
    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Dataset:
        corpora = {
            name: PackedCorpus(
                name,
                pack(tmp_path / name / "t", texts(*TRAIN)),
                pack(tmp_path / name / "v", texts(*held)),
                {},
            )
            for name, held in {"plays": HELD, "odd/../name": ("Zwölf!",)}.items()
        }
        return Dataset(corpora, TOKENIZER, "f" * 32, {"plays": 1.0, "odd/../name": 1.0}, tmp_path)

    def test_one_report_per_corpus(self, dataset: Dataset) -> None:
        model = awake(hybrid_config(vocab_size=TOKENIZER.vocab_size)).float()
        seen: list[str] = []
        scores = corpora.score_corpora(
            model, dataset, context_len=32, progress=lambda name, *_: seen.append(name)
        )
        assert list(scores) == ["plays", "odd/../name"] == list(dict.fromkeys(seen))
        content = scores["plays"].model_dump(mode="json")
        assert {"bpb", "tokens", "bytes", "documents", "baselines"} <= set(content)
        assert content["bytes"] == len(bytes_of(*HELD))
        assert content["baselines"]["uniform"] == 8
        plain = corpora.score_corpora(model, dataset, context_len=32, baselines=False)
        assert plain["plays"].baselines is None
        assert plain["plays"].bpb == scores["plays"].bpb

    def test_a_stop_leaves_the_other_corpora_out(self, dataset: Dataset) -> None:
        model = awake(hybrid_config(vocab_size=TOKENIZER.vocab_size)).float()
        polls = iter([False, True, True, True])
        scores = corpora.score_corpora(
            model, dataset, context_len=32, baselines=False, stop=lambda: next(polls)
        )
        assert list(scores) == ["plays"]
        assert not scores["plays"].complete

    def test_baselines_are_kept(
        self,
        dataset: Dataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        first = corpora.corpus_baselines(dataset, "plays", cache_dir=tmp_path)
        calls: list[int] = []

        def measure(*arguments: object) -> Baselines:
            calls.append(1)
            return first

        monkeypatch.setattr(corpora, "measure_baselines", measure)
        assert corpora.corpus_baselines(dataset, "plays", cache_dir=tmp_path) == first
        assert calls == []
        corpora.corpus_baselines(dataset, "odd/../name", cache_dir=tmp_path)
        corpora.corpus_baselines(dataset, "plays")
        assert len(calls) == 2
        (kept, _) = files = sorted((tmp_path / "baselines").iterdir())
        for file in files:
            file.write_text('{"uniform": "no"}')
        with caplog.at_level(logging.WARNING, "valkyrie"):
            assert corpora.corpus_baselines(dataset, "plays", cache_dir=tmp_path) == first
        assert "measuring the baselines again" in caplog.text
        assert kept.parent == tmp_path / "baselines"
