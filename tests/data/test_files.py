from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from tests.data.helpers import prose, write_jsonl, write_stories
from valkyrie_core.data.corpus import FilesCorpus, read_corpus
from valkyrie_core.data.documents import Document
from valkyrie_core.errors import MissingError, RecipeError


def read(**config: object) -> tuple[list[Document], list[Document], dict[str, int]]:
    return read_corpus("c", FilesCorpus.model_validate(config))


def all_names(*sides: list[Document]) -> list[str]:
    return sorted(document.name for side in sides for document in side)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 3)
    write_stories(tmp_path / "texts" / "inner", 1)
    (tmp_path / "texts" / "inner" / "story-00.txt").write_text("another one")
    (tmp_path / "texts" / "note.md").write_text("# A note")
    (tmp_path / "texts" / "code.py").write_text("print(1)")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "texts" / ".git").mkdir()
    (tmp_path / "texts" / ".git" / "config.txt").write_text("hidden")
    train, validation, _ = read(paths=["texts"])
    names = ["code.py", "inner/story-00.txt", "note.md"]
    names += [f"story-{number:02d}.txt" for number in range(3)]
    assert all_names(train, validation) == [f"texts/{name}" for name in names]
    assert [d.name for d in train] == sorted(d.name for d in train)


def test_globs_and_overlapping_paths_give_a_file_once(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 4)
    train, validation, dropped = read(
        paths=["texts/*.txt", "texts/story-00.txt", "./texts", "**/*.txt"]
    )
    assert len(train) + len(validation) == 4
    assert dropped == {}
    (tmp_path / "link.txt").symlink_to(tmp_path / "texts" / "story-00.txt")
    train, validation, dropped = read(paths=["texts", "link.txt"])
    assert len(train) + len(validation) == 4
    assert dropped == {}


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    (tmp_path / "[a].txt").write_text("brackets")
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.rst").write_text("named, so its ending does not matter")
    train, validation, _ = read(paths=["[a].txt", "b.rst"])
    assert all_names(train, validation) == ["[a].txt", "b.rst"]


def test_files_that_are_no_utf8_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_stories(tmp_path / "texts", 3)
    (tmp_path / "texts" / "latin.txt").write_bytes("café".encode("latin-1"))
    with caplog.at_level("WARNING", logger="valkyrie"):
        train, validation, dropped = read(paths=["texts"])
    assert dropped == {"not UTF-8": 1}
    assert len(train) + len(validation) == 3
    assert "texts/latin.txt" in caplog.text


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello")
    (tmp_path / "b.txt").write_text("World\r\n", newline="")
    train, validation, _ = read(paths=["*.txt"])
    assert sorted(d.text for d in (*train, *validation)) == ["Hello", "World\r\n"]


def test_empty_and_duplicate_documents_are_counted(tmp_path: Path) -> None:
    folder = write_stories(tmp_path / "texts", 4)
    (folder / "copy.txt").write_text(prose(1))
    (folder / "empty.txt").write_text(" \n")
    train, validation, dropped = read(paths=["texts"])
    assert dropped == {"duplicate": 1, "empty": 1}
    assert len(train) + len(validation) == 4


def test_jsonl_and_parquet_rows_are_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n), "id": n} for n in range(3)])
    frame = pd.DataFrame({"text": [prose(10), None, prose(11)]})
    frame.to_parquet(tmp_path / "b.parquet")
    train, validation, dropped = read(paths=["."])
    assert all_names(train, validation) == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "b.parquet:1",
        "b.parquet:3",
    ]
    assert dropped == {"no text": 1}
    assert {d.text for d in (*train, *validation)} == {prose(n) for n in (0, 1, 2, 10, 11)}


def test_line_separators_inside_json_strings_split_no_row(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_text(
        '{"text": "' + text + '"}\n\n{"text": "lone \\ud800"}\n', encoding="utf-8"
    )
    train, validation, _ = read(paths=["a.jsonl"])
    assert {d.text for d in (*train, *validation)} == {text, "lone \ufffd"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "bad.jsonl:2:10: not JSON (Expecting value)"),
        (b'{"text": "\xff"}\n', "bad.jsonl:1:11: not UTF-8"),
        (b'{"text": "a"}\n[1]\n', "bad.jsonl:2: not a JSON object but list"),
        (b"[" * 100_000, "bad.jsonl:1:1: not JSON (nested too deeply)"),
        (
            b'{"n": ' + b"9" * 5000 + b"}\n",
            "bad.jsonl:1:1: not JSON (a number with too many digits)",
        ),
    ],
)
def test_a_bad_line_is_located(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(MissingError) as caught:
        read(paths=["bad.jsonl"])
    assert caught.value.message == message


def test_a_wrong_column_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"txet": "a", "id": 1}])
    with pytest.raises(RecipeError) as caught:
        read(paths=["a.jsonl"])
    assert caught.value.message == "data.corpora.c: a.jsonl:1: no column 'text'; there are id, txet"
    assert caught.value.hint == "did you mean format.field: txet?"
    with pytest.raises(RecipeError, match="column 'id' holds int, not text"):
        read(paths=["a.jsonl"], format={"type": "text", "field": "id"})


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(MissingError, match=r"^a\.parquet: not a readable parquet file"):
        read(paths=["a.parquet"])


def test_a_path_that_matches_nothing_names_the_nearest(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 2)
    with pytest.raises(MissingError) as caught:
        read(paths=["texts", "text"])
    assert caught.value.message == "text: no such file or folder"
    assert caught.value.hint == "did you mean texts?"
    (tmp_path / "void").mkdir()
    with pytest.raises(MissingError, match=r"no file that ends with \.txt"):
        read(paths=["void"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 2)
    (tmp_path / "texts" / "story-01.txt").chmod(0)
    with pytest.raises(MissingError, match=r"story-01\.txt: can't be read"):
        read(paths=["texts"])


def test_validation_on_files_of_their_own(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 6)
    holdout = {"type": "files", "paths": ["texts/story-03.txt", "texts/story-05.txt"]}
    train, validation, dropped = read(paths=["texts"], holdout=holdout)
    assert [d.name for d in validation] == ["texts/story-03.txt", "texts/story-05.txt"]
    assert [d.name[-6:-4] for d in train] == ["00", "01", "02", "04"]
    assert dropped == {}


def test_what_is_validated_on_is_not_trained_on(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 4)
    (tmp_path / "held.txt").write_text(prose(2))
    holdout = {"type": "files", "paths": ["held.txt"]}
    train, validation, dropped = read(paths=["texts"], holdout=holdout)
    assert [d.text for d in validation] == [prose(2)]
    assert prose(2) not in [d.text for d in train]
    assert dropped == {"also in validation": 1}


def test_chat_rows(tmp_path: Path) -> None:
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = [
        {
            "messages": [
                message("system", "Be kind."),
                message("user", f"Hi {n}"),
                message("assistant", "Hello"),
            ]
        }
        for n in range(4)
    ]
    rows.append({"messages": [message("user", "no answer")]})
    rows.append(
        {"messages": [message("user", "x"), message("tool", "y"), message("assistant", "z")]}
    )
    write_jsonl(tmp_path / "chat.jsonl", rows)
    pd.DataFrame(rows[:2]).to_parquet(tmp_path / "chat.parquet")
    train, validation, dropped = read(paths=["chat.jsonl"], format={"type": "chat"})
    assert dropped == {"no answer": 1, "unknown role": 1}
    assert sorted(d.pieces[1].text for d in (*train, *validation)) == [
        f"Be kind.\nHi {n}" for n in range(4)
    ]
    train, validation, _ = read(paths=["chat.parquet"], format={"type": "chat"})
    assert len(train) + len(validation) == 2


@pytest.mark.parametrize(
    "messages", ["text", [1], [{"role": "user"}], [{"role": 1, "content": "a"}], None]
)
def test_rows_that_hold_no_messages(tmp_path: Path, messages: object) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    with pytest.raises(RecipeError, match=r"chat\.jsonl:1: column 'messages' is no list"):
        read(paths=["chat.jsonl"], format={"type": "chat"})


def test_chat_wants_rows(tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text("hello")
    with pytest.raises(RecipeError, match="the format 'chat' reads rows"):
        read(paths=["chat.txt"], format={"type": "chat"})


def test_answers_alone_must_be_left_to_score(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(MissingError) as caught:
        read(paths=["a.txt"])
    assert caught.value.message == "data.corpora.c: no documents are left (dropped: 1 not UTF-8)"


def test_the_digest_follows_names_and_contents(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 3)
    corpus = FilesCorpus(paths=("texts",))
    before = corpus.digest(tmp_path)
    assert corpus.digest(tmp_path) == before
    (tmp_path / "texts" / "story-00.txt").write_text("something else")
    changed = corpus.digest(tmp_path)
    assert changed != before
    (tmp_path / "texts" / "story-00.txt").rename(tmp_path / "texts" / "zzz.txt")
    assert corpus.digest(tmp_path) not in (before, changed)


def test_splits_of_another_kind_of_corpus_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        FilesCorpus.model_validate({"paths": ["a"], "holdout": {"type": "split"}})
