"""`valkyrie read`, and the states that chat and generate begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def call(cli: Cli, runs_dir: Path) -> Any:
    def run(command: str, *args: str, stdin: str = "") -> Any:
        return cli(command, *args, "--runs-dir", str(runs_dir), stdin=stdin)

    return run


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time there was a book.\n" * 20, encoding="utf-8")
    return path


def test_a_book_is_read_once_and_gone_on_from(call: Any, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "book.state"
    outcome = call("read", "tiny-hybrid", str(book), "--save-state", str(state), "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["schema"] == "valkyrie.read/1"
    # a byte is a token; one marker begins the document
    assert report["tokens"] == report["total_tokens"] == len(book.read_bytes()) + 1
    assert report["file_bytes"] == state.stat().st_size
    talk = call(
        "chat", "tiny-hybrid", "--state", str(state), "--max-tokens", "4", "--json",
        stdin="Hello\n/stats\n",
    )  # fmt: skip
    assert talk.code == 0, talk.err
    # the question alone is read: <|user|> 5 bytes <|end|> <|assistant|>, and an <|end|>
    assert talk.json["prompt_tokens"] in (8, 9)
    assert (
        f"{report['tokens'] + talk.json['prompt_tokens'] + talk.json['tokens']} tokens" in talk.err
    )
    text = call("generate", "tiny-hybrid", "--state", str(state), "-p", "In", "--max-tokens", "3")
    assert text.code == 0, text.err
    assert call("generate", "tiny-hybrid", "--state", str(state), "-p", "").code == 2


def test_reading_in_two_parts_is_reading_at_once(call: Any, book: Path, tmp_path: Path) -> None:
    whole, one, both = (tmp_path / name for name in ("whole", "one", "both"))
    second = tmp_path / "second.txt"
    second.write_text("And it ended.", encoding="utf-8")
    joined = tmp_path / "joined.txt"
    joined.write_text(book.read_text() + second.read_text(), encoding="utf-8")
    assert call("read", "tiny-hybrid", str(joined), "--save-state", str(whole)).code == 0
    assert call("read", "tiny-hybrid", str(book), "--save-state", str(one)).code == 0
    outcome = call(
        "read", "tiny-hybrid", str(second), "--state", str(one), "--save-state", str(both), "--json"
    )
    assert outcome.json["tokens"] == 13
    assert outcome.json["total_tokens"] == len(joined.read_bytes()) + 1
    answers = {
        call(
            "generate", "tiny-hybrid", "--state", str(state), "-p", "x", "--temperature", "0",
            "--max-tokens", "12", "--json",
        ).json["text"]
        for state in (whole, both)
    }  # fmt: skip
    assert len(answers) == 1


def test_states_in_a_conversation(call: Any, tmp_path: Path) -> None:
    state = tmp_path / "talk.state"
    lines = ["one", "/fork", "two", "/branch", "/branch 1", f"/save-state {state}", "/reset",
             f"/load-state {state}", "three"]  # fmt: skip
    outcome = call(
        "chat", "tiny-hybrid", "--max-tokens", "4", "--json", stdin="\n".join(lines) + "\n"
    )
    assert outcome.code == 0, outcome.err
    assert [turn["message"] for turn in outcome.json["turns"]] == ["three"]
    assert "branch 2 begins here, after 1 turns; /branch 1 goes back" in outcome.err
    assert "* 2  2 turns" in outcome.err
    assert "* 1  1 turns" in outcome.err
    assert state.exists()


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("/branch two", 2, "a branch has a number"),
        (f"/branch {'1' * 5000}", 2, "a branch has a number"),
        ("/save-state ~nobody-of-this-name/x", 2, "can't be used as a file name"),
        ("/load-state ~nobody-of-this-name/x", 2, "can't be used as a file name"),
        ("/save ~nobody-of-this-name/x", 2, "can't be used as a file name"),
        (f"/load {'x' * 300}", 2, "can't be used as a file name"),
        (f"/save-state {'x' * 300}", 2, "can't be used as a file name"),
        ("/save-state a\0b", 2, "can't be used as a file name"),
        ("/branch 2", 2, "/fork makes a second one"),
        ("/save-state", 2, "needs the name of a file"),
        ("/save-state x.state", 2, "nothing was read"),
        ("/load-state none.state", 4, "there is no state none.state"),
        ("/forc", 2, "no command /forc"),
    ],
)
def test_wrong_commands(call: Any, line: str, code: int, words: str) -> None:
    outcome = call("chat", "tiny-hybrid", "--json", stdin=line + "\n")
    assert outcome.code == code
    assert words in outcome.json["error"]["message"]


def test_a_state_never_overwrites_something_else(call: Any, book: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    outcome = call("read", "tiny-hybrid", str(book), "--save-state", str(mine), "--json")
    assert outcome.code == 2
    assert mine.read_text() == "mine"
    talk = call("chat", "tiny-hybrid", "--json", stdin=f"one\n/save-state {mine}\n")
    assert talk.code == 2
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "case", ["no text", "empty", "binary", "no folder", "no state", "chunk", "name"]
)
def test_mistakes_of_a_reader(case: str, call: Any, book: Path, tmp_path: Path) -> None:
    state, text, more, code = tmp_path / "s", book, [], 2
    if case == "no text":
        text, code = tmp_path / "none.txt", 4
    elif case == "empty":
        text.write_text("")
    elif case == "binary":
        text.write_bytes(b"\xff\xfe\x00")
    elif case == "no folder":
        state, code = tmp_path / "none" / "s", 4
    elif case == "no state":
        more, code = ["--state", str(tmp_path / "nothing")], 4
    elif case == "name":
        more = ["--state", "x" * 300]
    else:
        more = ["--chunk", "0"]
    outcome = call("read", "tiny-hybrid", str(text), "--save-state", str(state), *more, "--json")
    assert outcome.code == code, outcome.err
    assert outcome.json["schema"] == "valkyrie.read/1"
    assert not state.exists()


def test_a_branch_keeps_what_its_turns_cost(call: Any) -> None:
    outcome = call(
        "chat", "tiny-hybrid", "--max-tokens", "4", "--json",
        stdin='"""one\nand more"""\n/fork\ntwo\n/branch 1\n',
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (turn,) = outcome.json["turns"]
    assert turn["prompt_tokens"] > 10
    assert turn["seconds"] > 0
    assert "last asked: one and more" in outcome.err
