from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.data.helpers import prose, write_jsonl
from valkyrie_core.data.corpus import CorpusDocuments, HubCorpus, read_corpus
from valkyrie_core.errors import MissingError, RecipeError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the hub's layout: one parquet file per split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    for split, numbers in (("train", range(8)), ("validation", range(8, 10))):
        frame = pd.DataFrame({"text": [prose(n) for n in numbers], "label": list(numbers)})
        frame.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def read(folder: Path, **config: object) -> CorpusDocuments:
    return read_corpus("h", HubCorpus.model_validate({"dataset": str(folder)} | config))


def test_a_local_folder_in_hub_layout(folder: Path) -> None:
    train, validation, dropped = read(folder)
    assert {d.text for d in (*train, *validation)} == {prose(n) for n in range(8)}
    assert dropped == {}
    train, validation, _ = read(folder, holdout={"type": "split"})
    assert [d.text for d in train] == [prose(n) for n in range(8)]
    assert [(d.name, d.text) for d in validation] == [
        ("validation:1", prose(8)),
        ("validation:2", prose(9)),
    ]


def test_chat_rows_of_a_jsonl_set(tmp_path: Path, folder: Path) -> None:
    rows = [
        {"chat": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]}
        for n in range(5)
    ]
    (tmp_path / "chats").mkdir()
    write_jsonl(tmp_path / "chats" / "train.jsonl", rows)
    train, validation, _ = read(tmp_path / "chats", format={"type": "chat", "field": "chat"})
    assert {d.text for d in (*train, *validation)} == {f"Q{n}A{n}" for n in range(5)}


def test_the_digest_follows_the_files(folder: Path) -> None:
    corpus = HubCorpus(dataset=str(folder))
    before = corpus.digest(folder)
    assert corpus.digest(folder) == before
    path = folder / "data" / "train-00000-of-00001.parquet"
    pd.DataFrame({"text": ["another"]}).to_parquet(path)
    assert corpus.digest(folder) != before


def test_a_pinned_commit_needs_no_look(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert HubCorpus(dataset="nobody/nothing", revision=commit).digest(tmp_path) == commit


def test_wrong_names_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        read(folder, split="tarin")
    assert "split 'tarin'" in caught.value.message
    assert "\n" not in caught.value.message
    with pytest.raises(MissingError, match="hub data set"):
        read(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="hub data set"):
        read(folder, config_name="nope")
    with pytest.raises(RecipeError, match="no column 'txt'; there are label, text"):
        read(folder, format={"type": "text", "field": "txt"})


@pytest.mark.parametrize(
    "change", [{"format": {"type": "chitchat"}}, {"holdout": {"type": "files", "paths": ["a"]}}]
)
def test_what_only_files_can_do_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="union_tag_invalid"):
        HubCorpus.model_validate({"dataset": "a/b"} | change)
