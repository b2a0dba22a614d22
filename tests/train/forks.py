"""Training in forked children that are killed: torch is imported once, a trial costs little."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], None]) -> int:
    """Start `work` in a child process; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # no cleanup of the parent's: no pytest, no coverage, no temporary directories
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_to_the_end(work: Callable[[], None]) -> None:
    """Do `work` in a child and expect it to succeed."""
    code = wait(fork(work))
    assert code == 0, f"the child ended with {code}"


def kill_after(work: Callable[[], None], seconds: float) -> int:
    """Do `work` in a child that is killed after so many seconds; returns how it ended."""
    child = fork(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # harmless if it has ended: it has not been waited for yet
    return wait(child)


class KillAt:
    """A storage hook that ends its process with SIGKILL at the n-th event; 0: never."""

    def __init__(self, at: int = 0) -> None:
        self.count, self.at = 0, at

    def __call__(self, event: str, path: Path) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
