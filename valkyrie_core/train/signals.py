"""Ctrl-C and SIGTERM: the first one asks to stop, the second one ends the process at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

log = logging.getLogger("valkyrie")

HARD_EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequestedError(BaseException):
    """Raised by `StopSignal.poll` and inside `StopSignal.immediate`, caught by the trainer.

    No Exception: nothing on the way may mistake it for a failure and carry on.
    """


def _exit_at_once() -> None:
    # no cleanup on purpose: the user asked twice, and every file is safe to leave as it is
    os._exit(HARD_EXIT_CODE)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, while it is entered as a context.

    Loops call `poll` often: at every micro-batch, every validation batch, every sampled token.
    """

    def __init__(
        self,
        exit_at_once: Callable[[], None] = _exit_at_once,
        *,
        then: str = "saving as soon as the step is done",
    ) -> None:
        """`then`: what follows the first signal, for the user."""
        self._then = then
        self.received: str | None = None
        self._exit_at_once = exit_at_once
        self._immediate = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        # Python runs handlers in the main thread only; elsewhere the host program owns signals
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def request(self, reason: str) -> None:
        """Ask to stop, as a signal does."""
        self.received = reason

    def poll(self) -> None:
        """Raise StopRequestedError once a signal has come."""
        if self.received is not None:
            raise StopRequestedError(self.received)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Where nobody polls and nothing can be lost (preparing data): raise from the handler."""
        self.poll()
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False
        self.poll()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            self._exit_at_once()
        self.received = signal.Signals(number).name
        if self._immediate:
            raise StopRequestedError(self.received)
        # a step of a large model takes minutes
        log.warning("%s: %s; once more ends at once", self.received, self._then)
