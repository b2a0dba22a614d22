"""Chat: pipes, commands, a real terminal, and answers that would like to steer it."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.conftest import Cli
from tests.cli.test_render import STEERING, hostile
from valkyrie_cli.conversation import HELP, Conversation
from valkyrie_cli.prompts import messages, read_message
from valkyrie_cli.render import safe_text
from valkyrie_core.errors import UsageError


@pytest.fixture
def chat(cli: Cli, runs_dir: Path) -> Any:
    """chat("message\n", "--json") -> Outcome, with short answers."""

    def call(stdin: str | bytes, *args: str) -> Any:
        return cli("chat", "--runs-dir", str(runs_dir), "--max-tokens", "6", *args, stdin=stdin)

    return call


def test_one_piped_message_gives_one_object(chat: Any) -> None:
    outcome = chat("How are you?\n", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["schema"] == "valkyrie.chat/1"
    assert report["run"] == "tiny-hybrid"
    (turn,) = report["turns"]
    assert turn["message"] == "How are you?"
    assert report["answer"] == turn["answer"]
    # <|doc|> <|user|> 12 bytes <|end|> <|assistant|>, and the <|end|> if the answer had none
    assert turn["prompt_tokens"] in (16, 17)
    assert report["tokens"] == turn["tokens"] <= 6


def test_several_lines_are_several_turns(chat: Any) -> None:
    report = chat("one\n\ntwo\r\nthree", "--json").json
    assert [turn["message"] for turn in report["turns"]] == ["one", "two", "three"]
    assert report["answer"] == report["turns"][-1]["answer"]
    assert report["tokens"] == sum(turn["tokens"] for turn in report["turns"])
    # a turn costs its own tokens, not the conversation's: "three" is two bytes more than "two"
    assert report["turns"][2]["prompt_tokens"] <= report["turns"][1]["prompt_tokens"] + 3


def test_plain_output_is_the_answers_alone(chat: Any) -> None:
    turns = chat("one\ntwo\n", "--json").json["turns"]
    outcome = chat("one\ntwo\n")
    assert outcome.out == "".join(safe_text(turn["answer"]) + "\n" for turn in turns)
    assert "has seen no conversations" in outcome.err


def test_the_same_seed_gives_the_same_answers(chat: Any) -> None:
    first = chat("one\n", "--json").json["answer"]
    assert chat("one\n", "--json").json["answer"] == first
    assert chat("one\n", "--json", "--seed", "7").json["answer"] != first


def test_commands_work_in_a_pipe(chat: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "one",
        "/stats",
        "two",
        "/undo",
        "/retry",
        f"/save {file}",
        "/reset",
        f"/load {file}",
        "//etc/passwd",
        "/help",
        "/quit",
        "never",
    ]
    outcome = chat("\n".join(lines), "--json")
    assert outcome.code == 0, outcome.err
    assert [turn["message"] for turn in outcome.json["turns"]] == ["one", "/etc/passwd"]
    assert "last turn: read" in outcome.err
    for command in HELP:
        assert command in outcome.err
    plain = chat("one\n", "--json").json["answer"]
    assert outcome.json["turns"][0]["answer"] != plain


def test_save_never_overwrites_something_else(chat: Any, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    outcome = chat(f"one\n/save {file}\n", "--json")
    assert outcome.code == 2
    assert file.read_text() == "mine"
    other = tmp_path / "talk.json"
    assert chat(f"one\n/save {other}\n/save {other}\n").code == 0


@pytest.mark.parametrize(
    ("line", "code", "hint"),
    [
        ("/rest", 2, "did you mean /reset?"),
        ("/xyzzy", 2, "/help"),
        ("/save", 2, "/save talk.json"),
        ("/undo", 2, ""),
        ("/retry", 2, ""),
        ("/load no-such-file", 4, ""),
    ],
)
def test_wrong_commands_in_a_pipe_fail(chat: Any, line: str, code: int, hint: str) -> None:
    outcome = chat(line + "\n", "--json")
    assert outcome.code == code
    assert outcome.json["schema"] == "valkyrie.chat/1"
    assert hint in (outcome.json["error"]["hint"] or "")


@pytest.mark.parametrize("stdin", ["", "\n", "  \n\n"])
def test_an_empty_pipe_is_a_usage_error(chat: Any, stdin: str) -> None:
    outcome = chat(stdin, "--json")
    assert outcome.code == 2
    assert "no message" in outcome.json["error"]["message"]


def test_bytes_that_are_no_text(chat: Any) -> None:
    outcome = chat(b"caf\xe9 \xff\x00\x1b[2J\n", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["turns"][0]["message"] == "caf\ufffd \ufffd\x00\x1b[2J"


def lines_of(text: str) -> Any:
    rest = iter(text.split("\n"))
    return lambda prompt: next(rest, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ["plain"]),
        ("two \\\nlines", ["two \nlines"]),
        ('"""\na\n\nb\n"""\nnext', ["a\n\nb", "next"]),
        ('"""one line"""', ["one line"]),
        ('"""starts here\nends"""  ', ["starts here\nends"]),
        ('"""never closed\n/quit', ["never closed\n/quit"]),
        ("open \\", ["open "]),
        ("", []),
        (" \n\t\nx", ["x"]),
    ],
)
def test_messages_over_several_lines(text: str, expected: list[str]) -> None:
    assert list(messages(lines_of(text))) == expected


@given(st.text(alphabet='ab"\\/ \n', max_size=40))
def test_any_input_ends(text: str) -> None:
    read_line = lines_of(text)
    for _ in range(50):
        if read_message(read_line) is None:
            return
    raise AssertionError("reading never ends")


class HostileSession:
    """Answers with what it is given."""

    def __init__(self, chunks: list[str]) -> None:
        self.chunks = chunks
        self.turns: tuple[str, ...] = ()

    def send(self, text: str) -> Iterator[str]:
        yield from self.chunks
        self.turns = (*self.turns, text)

    def stats(self) -> Any:
        return SimpleNamespace(prefilled_tokens=1, drawn_tokens=1)


@given(st.lists(hostile, max_size=5))
def test_no_answer_steers_the_terminal(chunks: list[str]) -> None:
    written: list[str] = []
    opened: Any = SimpleNamespace(session=HostileSession(chunks))
    conversation = Conversation(opened, written.append)
    assert conversation.take("hello")
    output = "".join(written)
    assert not STEERING.search(output)
    assert output == safe_text("".join(chunks)) + "\n"
    # the report keeps what was said; JSON escapes it
    assert conversation.turns[0].answer == "".join(chunks)


def test_unknown_commands_are_told_in_a_terminal_too() -> None:
    opened: Any = SimpleNamespace(session=HostileSession([]))
    with pytest.raises(UsageError, match="/quti"):
        Conversation(opened, lambda text: None).take("/quti")


class Terminal:
    """The program behind a pseudo-terminal."""

    def __init__(self, *args: str, cache: Path) -> None:
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "valkyrie_cli", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={
                **os.environ,
                "VALKYRIE_CACHE": str(cache),
                "OMP_NUM_THREADS": "1",
                "TERM": "dumb",
                "NO_COLOR": "1",
            },
        )
        os.close(slave)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What came up to and with `text`; it is taken out of what was seen."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            self._read()
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def _read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], 0.5)
        if not ready:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.seen += data.decode("utf-8", "surrogateescape")
        return bool(data)

    def finish(self, seconds: float = 30) -> int:
        end = time.monotonic() + seconds
        while self._read() and time.monotonic() < end:
            continue
        code = self.process.wait(timeout=5)
        os.close(self.master)
        return code


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_at_a_terminal(runs_dir: Path, cache: Path) -> None:
    terminal = Terminal(
        "chat", "--runs-dir", str(runs_dir), "--temperature", "10", "--max-tokens", "300",
        "--top-p", "1", cache=cache,
    )  # fmt: skip
    terminal.wait_for("> ")
    terminal.send("hello\n")
    answer = terminal.wait_for("> ")
    # an untrained byte model at this temperature writes every control byte there is
    assert re.search(r"\\x[01][0-9a-f]", answer)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e]", answer)
    terminal.send("/rest\n")
    assert "did you mean /reset?" in terminal.wait_for("> ")
    terminal.send("/stats\n")
    assert "1 turns" in terminal.wait_for("> ")
    terminal.send("/undo\n")
    assert "0 left" in terminal.wait_for("> ")
    terminal.send("\x04")
    assert terminal.finish() == 0
    assert "Traceback" not in terminal.seen


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_not_the_chat(runs_dir: Path, cache: Path) -> None:
    # the likeliest byte never ends an answer: this run has not seen an end
    terminal = Terminal(
        "chat", "--runs-dir", str(runs_dir), "--max-tokens", "1000000", "--temperature", "0",
        cache=cache,
    )  # fmt: skip
    terminal.wait_for("> ")
    # Python's line editor misses a Ctrl-C that comes while it draws its prompt
    time.sleep(1)
    terminal.send("\x03")
    terminal.wait_for("Ctrl-D or /quit ends")
    terminal.wait_for("> ")
    terminal.send("hello\n")
    terminal.wait_for("hello")
    end = time.monotonic() + 60
    while len(terminal.seen) < 30:
        assert time.monotonic() < end, f"the answer is short: {terminal.seen!r}"
        terminal._read()
    terminal.send("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.send("/stats\n")
    assert "1 turns" in terminal.wait_for("tokens, state")
    terminal.send("/quit\n")
    assert terminal.finish() == 0
