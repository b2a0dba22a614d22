"""What reaches a terminal, and what a result looks like as JSON."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.console import Console
from rich.progress import Progress

from valkyrie_cli import render
from valkyrie_core.report import DoctorReport

STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# the sequences that rich itself writes: colours and bold
SGR = re.compile(r"\x1b\[[0-9;]*m")
hostile = st.text(
    st.one_of(
        st.characters(codec=None),
        st.sampled_from("\x1b\x9b\x07\x08\r\x7f\x00\u202e\u2066\u200f\ud800\udfff[]0;m\\"),
    )
)


@given(hostile)
def test_safe_text_holds_nothing_that_steers(text: str) -> None:
    safe = render.safe_text(text)
    assert not STEERING.search(safe)
    assert render.safe_text(safe) == safe
    safe.encode("utf-8")


@given(hostile)
def test_harmless_characters_stay(text: str) -> None:
    kept = STEERING.sub("", text)
    assert render.safe_text(kept) == kept


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\x9bm", "a\\x9bm"),
        ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("back\rward", "back\\x0dward"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("é 漢 😀 ‍", "é 漢 😀 ‍"),
    ],
)
def test_safe_text_shows_escapes(text: str, shown: str) -> None:
    assert render.safe_text(text) == shown


@given(hostile, st.lists(st.integers(min_value=0, max_value=60)))
def test_a_stream_is_safe_however_it_is_split(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert "".join(render.safe_chunks(pieces)) == render.safe_text(text)


def terminal_output(draw: Callable[[Console], None]) -> str:
    """What a terminal would receive."""
    console = render.make_console()
    console.file = io.StringIO()
    console._force_terminal = True
    draw(console)
    return SGR.sub("", console.file.getvalue())


@given(hostile)
def test_a_console_escapes_what_nobody_escaped(text: str) -> None:
    def draw(console: Console) -> None:
        console.print(text)
        table = render.make_table("name", title=text)
        table.add_row(text)
        console.print(table)

    assert not STEERING.search(terminal_output(draw))


def test_markup_and_emoji_codes_are_text() -> None:
    shown = terminal_output(lambda console: console.print("[bold]x[/oops] :smile:"))
    assert "[bold]x[/oops] :smile:" in shown


def test_a_progress_bar_still_works_on_a_safe_console() -> None:
    console = render.make_console()
    console.file = io.StringIO()
    console._force_terminal = True
    with Progress(console=console) as progress:
        progress.add_task("work \x1b]0;title\x07", total=1)
        progress.refresh()
    output = console.file.getvalue()
    assert "\x1b[" in output
    assert "\x1b]0" not in output
    assert "\\x1b]0" in output


class Sample(BaseModel):
    number: float
    parts: dict[str, float] = {}


def test_emit_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(console: Console) -> None:
        raise AssertionError("human must not be called")

    report = Sample(number=float("nan"), parts={"a": float("inf"), "b": 1.5})
    render.emit(report, as_json=True, human=refuse)
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == {"number": None, "parts": {"a": None, "b": 1.5}}
    assert captured.err == ""


def test_emit_calls_human_with_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    render.emit({}, as_json=False, human=lambda console: console.print("hello"))
    assert capsys.readouterr().out == "hello\n"


@given(hostile)
def test_json_is_plain_ascii_and_comes_back(text: str) -> None:
    line = render.to_json({"text": text})
    assert re.fullmatch(r"[\x20-\x7e]+", line)
    assert json.loads(line)["text"] == text


def test_json_uses_the_name_schema() -> None:
    report = DoctorReport(ok=True, environment={"peak": float("nan")}, checks=[])
    data = json.loads(render.to_json(report))
    assert data["schema"] == "valkyrie.doctor/1"
    assert data["environment"] == {"peak": None}


def test_a_pipe_gets_whole_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # set by a terminal that make runs in
    monkeypatch.delenv("COLUMNS", raising=False)
    table = render.make_table("a", "b")
    table.add_row("x" * 60, "y" * 60)
    render.emit({}, as_json=False, human=lambda console: console.print(table))
    out = capsys.readouterr().out
    assert "x" * 60 in out
    assert "y" * 60 in out


def test_logs_go_to_stderr_and_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    render.configure_logging()
    render.configure_logging()
    logging.getLogger("valkyrie").info("reading %s", "\x1b[2Jfile")
    logging.getLogger("valkyrie.data").warning("half a file")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading \\x1b[2Jfile\nwarning: half a file\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(999, "999"), (1234, "1.23k"), (1_234_567, "1.23M"), (2.5e9, "2.5B"), (3e12, "3T")],
)
def test_human_count(value: float, shown: str) -> None:
    assert render.human_count(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (3.21, "3.2 s"), (245, "4 min 05 s"), (7380, "2 h 03 min"), (59.99, "60.0 s")],
)
def test_human_seconds(seconds: float | None, shown: str) -> None:
    assert render.human_seconds(seconds) == shown
