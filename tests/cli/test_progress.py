"""Progress: a bar that fits its terminal, lines where there is none."""

from __future__ import annotations

import io
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

from valkyrie_cli.progress import ReadingDisplay, TrainingDisplay, can_move
from valkyrie_cli.render import configure_logging


def event(step: int, **changes: Any) -> Any:
    values = {
        "step": step,
        "steps": 12345,
        "loss": 2.34567,
        "tokens_per_second": 12345.6,
        "mfu": 0.345,
        "eta_seconds": 754.2,
        "validation": None,
        "message": None,
        "experts": None,
        "thought": None,
    }
    return SimpleNamespace(**{**values, **changes})


def show(display: TrainingDisplay, *events: Any) -> str:
    output = io.StringIO()
    display._console.file = output
    with display:
        for one in events:
            display.show(one)
    return output.getvalue()


def live(width: int, monkeypatch: pytest.MonkeyPatch) -> TrainingDisplay:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = TrainingDisplay("name", log_every=10)
    display._console.width = width
    assert can_move(display._console)
    return display


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_bar_fits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    output = show(
        live(width, monkeypatch),
        event(1),
        event(500, validation=SimpleNamespace(bpb=2.1234)),
        event(1234),
    )
    frames = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for part in re.split(r"[\r\n]+", output)]
    last = next(frame for frame in reversed(frames) if frame.strip())
    assert len(last) <= width
    assert "1234/12345" in last
    assert "loss 2.3457" in last
    assert "…" not in last
    wanted = {"ETA 12 min 34 s": 60, "val 2.1234 bpb": 80, "12,346 tokens/s": 80, "MFU 34.5 %": 100}
    for text, least in wanted.items():
        assert (text in last) == (width >= least), (text, last)


def test_logs_appear_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logging()
    display = live(80, monkeypatch)
    output = io.StringIO()
    display._console.file = output
    with display:
        display.show(event(1))
        logging.getLogger("valkyrie").warning("careful \x1b[2J")
        display.show(event(2))
    assert "warning: careful \\x1b[2J\n" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())


def test_lines_come_at_the_log_interval_and_at_the_end() -> None:
    display = TrainingDisplay("name", log_every=10)
    output = show(display, *(event(step, steps=25) for step in range(1, 26)))
    assert [line.split()[1] for line in output.splitlines()] == ["10/25", "20/25", "25/25"]
    assert "loss 2.3457  12,346 tokens/s  MFU 34.5 %  ETA 12 min 34 s" in output


def test_a_validation_has_its_own_line() -> None:
    display = TrainingDisplay("name", log_every=10)
    validation = SimpleNamespace(bpb=2.1234)
    unknown = {"loss": None, "tokens_per_second": None, "mfu": None, "eta_seconds": None}
    output = show(display, event(3, validation=validation), event(10, **unknown))
    assert output == "step 3/12345  validation 2.1234 bits/byte\nstep 10/12345\n"


def test_ci_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    display = live(80, monkeypatch)
    monkeypatch.setenv("CI", "true")
    assert not can_move(display._console)
    assert show(TrainingDisplay("name", log_every=10), event(10)).startswith("step 10/")


def test_reading_is_a_bar_or_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(display: ReadingDisplay) -> str:
        output = io.StringIO()
        display._console.file = output
        with display:
            for position in (10, 20):
                display.show("plays", position, 20)
        return output.getvalue()

    assert read(ReadingDisplay()) == "plays: 20 positions read\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("CI", raising=False)
    assert "100%" in read(ReadingDisplay())


def test_a_closed_stderr_does_not_end_the_training() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    display = TrainingDisplay("name", log_every=1)
    display._console.file = Closed()
    with display:
        display.show(event(1))
        display.show(event(2))


def test_what_came_of_questions_is_shown() -> None:
    thought = SimpleNamespace(accuracy=0.853, steps=6.24)
    display = TrainingDisplay("name", log_every=10)
    assert "right 85 %, 6.2 steps" in show(display, event(10, thought=thought))
    assert "right" not in show(TrainingDisplay("name", log_every=10), event(10))
