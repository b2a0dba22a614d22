from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from valkyrie_core.train.signals import StopRequestedError, StopSignal


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    # the handler runs between two instructions of Python, not at once
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_flag(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.poll()
        send(number)
        with pytest.raises(StopRequestedError, match=signal.Signals(number).name):
            stop.poll()
    assert signal.getsignal(number) is before


def test_the_second_one_leaves_at_once() -> None:
    left = []
    with StopSignal(exit_at_once=lambda: left.append(True)) as stop:
        send(signal.SIGINT)
        assert not left
        send(signal.SIGTERM)
        assert left == [True]
        assert stop.received == "SIGTERM"


def interrupted(stop: StopSignal, reached: list[str]) -> None:
    """Nobody polls in here, and a broad `except` stands in the way."""
    with stop.immediate():
        reached.append("begun")
        try:
            send(signal.SIGTERM)
        except Exception:
            reached.append("mistaken for a failure")
        reached.append("came back")


def test_where_nobody_polls_it_is_raised_from_the_handler() -> None:
    reached: list[str] = []
    with StopSignal() as stop:
        with pytest.raises(StopRequestedError, match="SIGTERM"):
            interrupted(stop, reached)
        assert reached == ["begun"]
        # nothing more is begun once a signal has come
        with pytest.raises(StopRequestedError):
            interrupted(stop, reached)
        assert reached == ["begun"]


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append(signal.getsignal(signal.SIGINT))
            stop.request("asked")
            with pytest.raises(StopRequestedError, match="asked"):
                stop.poll()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


TWICE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from valkyrie_core.train.signals import StopSignal
with StopSignal():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_process_that_never_polls_dies_of_the_second_signal_with_130() -> None:
    code = TWICE.format(root=str(Path(__file__).parents[2]))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - started < 2
    process.stdout.close()
