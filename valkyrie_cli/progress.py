"""Progress on stderr: a live bar at a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING

from valkyrie_cli.render import human_seconds, make_console, use_console_for_logs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID

    from valkyrie_core.runs import StepEvent


LEAST_BAR = 6
MOST_BAR = 30
"""Columns of the bar itself."""


def can_move(console: Console) -> bool:
    """Whether a bar can move: a terminal that understands cursor movements, and no CI log."""
    return console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI")


class ReadingDisplay:
    """Shows how far an evaluation has read; without a terminal, a line where a text ends."""

    def __init__(self) -> None:
        self._console = make_console(stderr=True)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ReadingDisplay:
        use_console_for_logs(self._console)
        if can_move(self._console):
            from rich.progress import Progress

            self._bar = Progress(console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        use_console_for_logs(None)

    def show(self, corpus: str, read: int, total: int) -> None:
        """So many positions of a corpus, of so many."""
        if self._bar is None:
            if read >= total:
                self._console.print(f"{corpus}: {total} positions read", soft_wrap=True)
            return
        if corpus not in self._tasks:
            self._tasks[corpus] = self._bar.add_task(corpus, total=total)
        self._bar.update(self._tasks[corpus], completed=read)


class TrainingDisplay:
    """Shows the events of one training; logs appear above the bar while it is entered."""

    def __init__(self, name: str, log_every: int) -> None:
        self._name = name
        self._log_every = log_every
        self._console = make_console(stderr=True)
        self._is_live = can_move(self._console)
        self._bar: Progress | None = None
        self._bar_column: BarColumn
        self._task: TaskID | None = None
        self._bpb: float | None = None

    def __enter__(self) -> TrainingDisplay:
        use_console_for_logs(self._console)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        use_console_for_logs(None)

    def show(self, event: StepEvent) -> None:
        """One step or one validation."""
        if event.validation is not None:
            self._bpb = event.validation.bpb
        if event.message is not None:
            self._console.print(event.message, soft_wrap=True)
        if self._is_live:
            self._move_bar(event)
        else:
            self._print_line(event)

    def _print_line(self, event: StepEvent) -> None:
        where = f"step {event.step}/{event.steps}"
        if event.validation is not None:
            line = f"{where}  validation {event.validation.bpb:.4f} bits/byte"
            self._console.print(line, soft_wrap=True)
        elif event.step % self._log_every == 0 or event.step == event.steps:
            parts = [where, *self._numbers(event).values()]
            self._console.print("  ".join(parts), soft_wrap=True)

    def _numbers(self, event: StepEvent) -> dict[str, str]:
        """What is known, by name, in the order in which it is shown."""
        numbers = {}
        if event.loss is not None:
            numbers["loss"] = f"loss {event.loss:.4f}"
        if self._bpb is not None and self._is_live:
            numbers["validation"] = f"val {self._bpb:.4f} bpb"
        if event.experts is not None:
            dead = f", {event.experts.dead} dead" if event.experts.dead else ""
            numbers["experts"] = f"MaxVio {event.experts.max_vio:.2f}{dead}"
        if event.thought is not None:
            numbers["thought"] = (
                f"right {100 * event.thought.accuracy:.0f} %, {event.thought.steps:.1f} steps"
            )
        if event.tokens_per_second is not None:
            numbers["speed"] = f"{event.tokens_per_second:,.0f} tokens/s"
        if event.mfu is not None:
            numbers["mfu"] = f"MFU {100 * event.mfu:.1f} %"
        if event.eta_seconds is not None:
            numbers["eta"] = f"ETA {human_seconds(event.eta_seconds)}"
        return numbers

    def _move_bar(self, event: StepEvent) -> None:
        if self._bar is None:
            self._bar = self._make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=event.steps, text="")
        assert self._task is not None
        numbers = self._numbers(event)
        text = self._joined(event, numbers)
        # a narrow terminal loses what can be read elsewhere
        for name in ("mfu", "speed", "experts", "validation", "thought", "eta"):
            if len(text) + LEAST_BAR + 1 <= self._console.width:
                break
            numbers.pop(name, None)
            text = self._joined(event, numbers)
        self._bar_column.bar_width = max(
            LEAST_BAR, min(MOST_BAR, self._console.width - len(text) - 1)
        )
        self._bar.update(self._task, completed=event.step, total=event.steps, text=text)

    def _joined(self, event: StepEvent, numbers: dict[str, str]) -> str:
        return "  ".join([f"{event.step}/{event.steps}", *numbers.values()])

    def _make_bar(self) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._bar_column = BarColumn(bar_width=LEAST_BAR)
        text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True))
        return Progress(self._bar_column, text, console=self._console)
