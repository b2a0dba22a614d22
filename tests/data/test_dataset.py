from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.helpers import make_wheel, prose, write_jsonl, write_stories
from valkyrie_core.data import dataset as dataset_module
from valkyrie_core.data.dataset import DataConfig, Dataset, prepare, read_corpora
from valkyrie_core.data.documents import NUM_RESERVED
from valkyrie_core.errors import MissingError, RecipeError


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    corpus = {
        "type": "files",
        "paths": [str(tmp_path / "texts")],
        "holdout": {"type": "fraction", "fraction": 0.3},
    }
    return DataConfig.model_validate(
        {"corpora": {"stories": corpus}, "tokenizer": {"type": "bytes"}} | changes
    )


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write_stories(tmp_path / "texts", 12)


def chat_corpus(tmp_path: Path, count: int = 10) -> dict[str, Any]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {n}?"},
                {"role": "assistant", "content": f"It is {n}é."},
            ]
        }
        for n in range(count)
    ]
    write_jsonl(tmp_path / "chat.jsonl", rows)
    return {
        "type": "files",
        "paths": [str(tmp_path / "chat.jsonl")],
        "format": {"type": "chat"},
        "holdout": {"type": "fraction", "fraction": 0.3},
        "weight": 0.5,
    }


def same(a: Dataset, b: Dataset) -> bool:
    return (a.fingerprint, a.directory) == (b.fingerprint, b.directory)


def test_documents_are_packed_in_order(tmp_path: Path, stories: Path) -> None:
    data = prepare(config(tmp_path), cache=tmp_path / "cache")
    corpus = data.corpora["stories"]
    texts = {f"{stories.as_posix()}/story-{n:02d}.txt": prose(n).encode() for n in range(12)}
    seen = []
    for split in (corpus.train, corpus.validation):
        assert split.scored is None
        assert split.doc_starts[0] == 0
        assert split.doc_starts[-1] == len(split.tokens) == split.counts.tokens
        assert np.all(split.tokens[split.doc_starts[:-1]] == data.tokenizer.special_id("<|doc|>"))
        assert split.names == sorted(split.names)
        assert list(split.texts(data.tokenizer)) == [texts[name] for name in split.names]
        assert split.doc_bytes.tolist() == [len(texts[name]) for name in split.names]
        assert split.counts.bytes == split.doc_bytes.sum()
        assert split.counts.documents == split.num_documents == len(split.names)
        assert split.counts.truncated == 0
        assert split.counts.bytes_per_token == pytest.approx(split.counts.bytes / len(split.tokens))
        assert split.tokens.dtype == np.uint16
        seen += split.names
    assert sorted(seen) == sorted(texts)
    assert data.weights == {"stories": 1.0}
    assert corpus.truncated == 0


def test_chat_scores_answers_alone(tmp_path: Path) -> None:
    data = prepare(
        config(tmp_path, corpora={"chat": chat_corpus(tmp_path)}), cache=tmp_path / "cache"
    )
    train = data.corpora["chat"].train
    assert train.scored is not None
    for index in range(train.num_documents):
        tokens = train.tokens[train.doc_starts[index] : train.doc_starts[index + 1]]
        scored = train.scored[train.doc_starts[index] : train.doc_starts[index + 1]]
        answer = data.tokenizer.decode(tokens[scored == 1].tolist())
        assert answer.startswith("It is ")
        assert train.doc_bytes[index] == len(answer.encode())
        assert tokens[-1] == data.tokenizer.special_id("<|end|>")
        assert scored[-1] == 1
        assert scored[0] == 0
    assert train.counts.scored_tokens == train.scored.sum()
    assert data.weights == {"chat": 0.5}


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valkyrie_core.data.byte_tokenizer import BytesTokenizer

    monkeypatch.setattr(BytesTokenizer, "vocab_size", 70_000)
    monkeypatch.setattr(BytesTokenizer, "token_bytes", lambda _, t: b"x" if 5 <= t < 261 else b"")
    data = prepare(config(tmp_path), cache=tmp_path / "cache")
    assert data.corpora["stories"].train.tokens.dtype == np.uint32


def test_the_second_call_reads_the_cache(
    tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config(tmp_path, tokenizer={"type": "sentencepiece", "vocab_size": 300})
    first = prepare(values, cache=tmp_path / "cache")
    monkeypatch.setattr(dataset_module, "read_corpora", lambda *_, **__: pytest.fail("read again"))
    second = prepare(values, cache=tmp_path / "cache")
    assert same(first, second)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    for name in ("train", "validation"):
        a, b = (getattr(d.corpora["stories"], name) for d in (first, second))
        assert np.array_equal(a.tokens, b.tokens)
        assert a.names == b.names


def test_changed_content_is_noticed_and_weights_do_not_matter(
    tmp_path: Path, stories: Path
) -> None:
    first = prepare(config(tmp_path), cache=tmp_path / "cache")
    heavier = config(tmp_path).model_dump()
    heavier["corpora"]["stories"]["weight"] = 3.0
    weighted = prepare(DataConfig.model_validate(heavier), cache=tmp_path / "cache")
    assert same(first, weighted)
    assert weighted.weights == {"stories": 3.0}
    (stories / "story-00.txt").write_text("Rewritten.")
    changed = prepare(config(tmp_path), cache=tmp_path / "cache")
    assert changed.fingerprint != first.fingerprint
    corpus = changed.corpora["stories"]
    texts = [*corpus.train.texts(changed.tokenizer), *corpus.validation.texts(changed.tokenizer)]
    assert b"Rewritten." in texts
    (stories / "story-00.txt").write_text(prose(0))
    assert same(prepare(config(tmp_path), cache=tmp_path / "cache"), first)


def test_another_tokenizer_is_other_data(tmp_path: Path, stories: Path) -> None:
    first = prepare(config(tmp_path), cache=tmp_path / "cache")
    bpe = config(tmp_path, tokenizer={"type": "sentencepiece", "vocab_size": 300})
    second = prepare(bpe, cache=tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    # a run brings the tokenizer that its weights are bound to
    third = prepare(bpe, cache=tmp_path / "cache", tokenizer=first.tokenizer)
    assert same(third, first)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "empty"])
def test_a_damaged_cache_is_built_again_loudly(
    tmp_path: Path, stories: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(config(tmp_path), cache=tmp_path / "cache")
    tokens = np.array(first.corpora["stories"].train.tokens)
    path = first.directory / "0" / "train" / "tokens.bin"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "delete":
        path.unlink()
    elif damage == "manifest":
        (first.directory / "manifest.json").write_text("{")
    else:
        (first.directory / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        again = prepare(config(tmp_path), cache=tmp_path / "cache")
    assert "is damaged" in caplog.text
    assert same(first, again)
    assert np.array_equal(again.corpora["stories"].train.tokens, tokens)
    caplog.clear()
    prepare(config(tmp_path), cache=tmp_path / "cache")
    assert "is damaged" not in caplog.text


def test_a_damaged_cached_tokenizer_is_trained_again(
    tmp_path: Path, stories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = config(tmp_path, tokenizer={"type": "sentencepiece", "vocab_size": 300})
    first = prepare(values, cache=tmp_path / "cache").tokenizer
    (model,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.model")
    model.write_bytes(model.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        again = prepare(values, cache=tmp_path / "cache").tokenizer
    assert "is damaged" in caplog.text
    assert again.fingerprint == first.fingerprint


def _prepare_in_process(values: dict[str, Any], cache: Path, queue: Any) -> None:
    queue.put(prepare(DataConfig.model_validate(values), cache=cache).fingerprint)


def test_two_processes_at_once(tmp_path: Path, stories: Path) -> None:
    values = config(tmp_path, tokenizer={"type": "sentencepiece", "vocab_size": 300})
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(
            target=_prepare_in_process,
            args=(values.model_dump(mode="json"), tmp_path / "cache", queue),
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    prints = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert prints == {prepare(values, cache=tmp_path / "cache").fingerprint}
    assert len([p for p in (tmp_path / "cache" / "datasets").iterdir() if p.is_dir()]) == 1


def test_no_corpus_trains_on_what_another_validates_on(tmp_path: Path, stories: Path) -> None:
    corpora = {
        "a": {
            "type": "files",
            "paths": [str(stories)],
            "holdout": {"type": "names", "names": ["story-05.txt"]},
        },
        "b": {
            "type": "files",
            "paths": [str(stories)],
            "holdout": {"type": "names", "names": ["story-07.txt"]},
        },
    }
    read = read_corpora(config(tmp_path, corpora=corpora), cache=tmp_path / "cache")
    for documents in read.values():
        assert not {prose(5), prose(7)} & {d.text for d in documents.train}
        assert documents.dropped == {"also in validation": 1}
    assert [d.text for d in read["a"].validation] == [prose(5)]


def test_corpora_that_swallow_each_other(tmp_path: Path, stories: Path) -> None:
    names = [f"story-{n:02d}.txt" for n in range(11)]
    corpora = {
        "a": {
            "type": "files",
            "paths": [str(stories)],
            "holdout": {"type": "names", "names": names},
        },
        "b": {
            "type": "files",
            "paths": [str(stories)],
            "holdout": {"type": "names", "names": ["story-11.txt"]},
        },
    }
    with pytest.raises(RecipeError, match=r"data\.corpora\.a: all of its training text"):
        read_corpora(config(tmp_path, corpora=corpora), cache=tmp_path / "cache")


def test_a_conversation_split_without_answers_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(MissingError):
        prepare(config(tmp_path), cache=tmp_path / "cache")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": "\u200b"[:0]},
            ]
        }
        for n in range(4)
    ]
    write_jsonl(tmp_path / "chat.jsonl", rows)
    corpus = chat_corpus(tmp_path) | {"paths": [str(tmp_path / "chat.jsonl")]}
    write_jsonl(tmp_path / "chat.jsonl", rows)
    with pytest.raises(MissingError, match="no documents are left \\(dropped: 4 no answer\\)"):
        prepare(config(tmp_path, corpora={"chat": corpus}), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "datasets").glob("[!.]*"))


def test_progress_and_counts_are_told(
    tmp_path: Path, stories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, int]] = []
    (stories / "copy.txt").write_text(prose(3))
    with caplog.at_level(logging.INFO, logger="valkyrie"):
        data = prepare(
            config(tmp_path), cache=tmp_path / "cache", progress=lambda *event: told.append(event)
        )
    train = data.corpora["stories"].train.num_documents
    assert ("packing stories (train)", train, train) in told
    assert ("packing stories (validation)", 12 - train, 12 - train) in told
    assert "dropped 1 (duplicate)" in caplog.text
    assert f"training {train} documents" in caplog.text
    assert "bytes per token" in caplog.text


def test_no_reserved_id_but_the_markers(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"<|doc|> {prose(number)} <|end|><unk>")
    for tokenizer in ({"type": "bytes"}, {"type": "sentencepiece", "vocab_size": 290}):
        data = prepare(config(tmp_path, tokenizer=tokenizer), cache=tmp_path / "cache")
        train = data.corpora["stories"].train
        reserved = np.flatnonzero(train.tokens < NUM_RESERVED)
        assert reserved.tolist() == train.doc_starts[:-1].tolist()


def test_a_wheel_packs_like_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"plays/{n}.md": prose(n).encode() for n in range(5)}
    _, sha256 = make_wheel(tmp_path / "index", "plays", "1", members)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    corpus = {
        "type": "package",
        "package": "plays",
        "version": "1",
        "sha256": sha256,
        "members": ["plays/*.md"],
        "holdout": {"type": "names", "names": ["*4*"]},
    }
    data = prepare(config(tmp_path, corpora={"plays": corpus}), cache=tmp_path / "cache")
    packed = data.corpora["plays"]
    assert packed.validation.names == ["plays/4.md"]
    assert list(packed.train.texts(data.tokenizer)) == [prose(n).encode() for n in range(4)]
