"""Progress on stderr: a live bar at a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING

from valkyrie_cli.render import human_seconds, make_console, use_console_for_logs

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from valkyrie_core.runs import StepEvent


class TrainingDisplay:
    """Shows the events of one training; logs appear above the bar while it is entered."""

    def __init__(self, name: str, log_every: int) -> None:
        self._name = name
        self._log_every = log_every
        self._console = make_console(stderr=True)
        self._bar: Progress | None = None
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

    @property
    def is_live(self) -> bool:
        """Whether a bar can move: a terminal that understands cursor movements, and no CI log."""
        console = self._console
        return console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI")

    def show(self, event: StepEvent) -> None:
        """One step or one validation."""
        if event.validation is not None:
            self._bpb = event.validation.bpb
        if event.message is not None:
            self._console.print(event.message, soft_wrap=True)
        if self.is_live:
            self._move_bar(event)
        else:
            self._print_line(event)

    def _numbers(self, event: StepEvent) -> list[str]:
        parts = []
        if event.loss is not None:
            parts.append(f"loss {event.loss:.4f}")
        if event.tokens_per_second is not None:
            parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
        if event.mfu is not None:
            parts.append(f"MFU {100 * event.mfu:.1f} %")
        return parts

    def _print_line(self, event: StepEvent) -> None:
        where = f"step {event.step}/{event.steps}"
        if event.validation is not None:
            line = f"{where}  validation {event.validation.bpb:.4f} bits/byte"
            self._console.print(line, soft_wrap=True)
        elif event.step % self._log_every == 0 or event.step == event.steps:
            parts = [where, *self._numbers(event)]
            if event.eta_seconds is not None:
                parts.append(f"ETA {human_seconds(event.eta_seconds)}")
            self._console.print("  ".join(parts), soft_wrap=True)

    def _move_bar(self, event: StepEvent) -> None:
        if self._bar is None:
            self._bar = self._make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=event.steps, numbers="", eta="")
        assert self._task is not None
        parts = self._numbers(event)
        if self._bpb is not None:
            parts.append(f"val {self._bpb:.4f} bpb")
        eta = human_seconds(event.eta_seconds) if event.eta_seconds is not None else ""
        self._bar.update(
            self._task,
            completed=event.step,
            total=event.steps,
            numbers="  ".join(parts),
            eta=f"ETA {eta}" if eta else "",
        )

    def _make_bar(self) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TextColumn("{task.fields[eta]}", markup=False),
            console=self._console,
        )
