"""The one place that writes to a terminal: results on stdout, everything else on stderr.

Strings from outside (model output, file names, texts, error messages) may hold bytes that steer a
terminal. `safe_text` shows such bytes instead of sending them; every console made here applies it
to whatever it prints, so a forgotten call is not a hole.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object on stdout and nothing else.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one value of the recipe, by its path: --set train.steps=100. Repeatable.",
    ),
]
RunsDirOption = Annotated[str, typer.Option("--runs-dir", help="The folder that holds the runs.")]
RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run's name or directory; left out, the newest run."),
]

# C0 but tab and newline, DEL, C1, bidirectional controls, lone surrogates
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def safe_text(text: str) -> str:
    r"""The text with everything that steers a terminal shown as an escape, such as `\x1b`."""
    return _UNSAFE.sub(_escaped, text)


def safe_chunks(chunks: Iterable[str]) -> Iterator[str]:
    """`safe_text` of a stream: every chunk is safe by itself, so any split of it is safe."""
    for chunk in chunks:
        yield safe_text(chunk)


def safe_line(text: str) -> str:
    """One line of safe text: newlines and tabs are shown as well."""
    return safe_text(text).replace("\n", "\\n").replace("\t", "\\t")


def to_json(report: dict[str, Any] | BaseModel) -> str:
    """One line of plain ASCII JSON; numbers that are not finite become null."""
    data = report if isinstance(report, dict) else report.model_dump(mode="json", by_alias=True)
    text = json.dumps(_finite(data), allow_nan=False, default=str)
    return text.replace("\x7f", "\\u007f")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def emit(
    report: dict[str, Any] | BaseModel, *, as_json: bool, human: Callable[[Console], None]
) -> None:
    """Prints a command's result: one JSON object, or what `human` draws on the stdout console."""
    if as_json:
        sys.stdout.write(to_json(report) + "\n")
    else:
        human(make_console())
    sys.stdout.flush()


def make_console(*, stderr: bool = False) -> Console:
    """A console that takes its text literally (no markup, no emoji codes) and shows escapes."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(safe_text(segment.text), segment.style)

        def on_broken_pipe(self) -> None:
            # work goes on without its log; a result that nobody reads ends the program
            self.quiet = True
            if not self.stderr:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    stream = sys.stderr if stderr else sys.stdout
    # rich assumes 80 columns in a pipe and would cut tables there
    width = None if stream.isatty() or "COLUMNS" in os.environ else 160
    return SafeConsole(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def make_table(
    *columns: str, title: str | None = None, right: Iterable[str] = (), border: bool = True
) -> Table:
    """An empty table; the columns named in `right` are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        box=box.SIMPLE_HEAD if border else None,
        title_justify="left",
        show_header=border,
        pad_edge=False,
    )
    numbers = set(right)
    for column in columns:
        justify: Literal["right", "left"] = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold")
    return table


class StderrHandler(logging.Handler):
    """Log records as lines on stderr, above a progress bar where one is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.console: Console | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        text = record.getMessage()
        style = None
        if record.levelno >= logging.WARNING:
            style = "red" if record.levelno >= logging.ERROR else "yellow"
            text = f"{record.levelname.lower()}: {text}"
        try:
            console = self.console or make_console(stderr=True)
            console.print(text, style=style, soft_wrap=True)
        except (OSError, ValueError):
            # stderr is closed: the work goes on without its log
            return


_handler = StderrHandler()


def configure_logging() -> None:
    """Sends the records of the "valkyrie" logger to stderr."""
    logger = logging.getLogger("valkyrie")
    logger.setLevel(logging.DEBUG if os.environ.get("VALKYRIE_DEBUG") else logging.INFO)
    logger.propagate = False
    if _handler not in logger.handlers:
        logger.addHandler(_handler)


def use_console_for_logs(console: Console | None) -> None:
    """Logs go through this console, so that they appear above its progress bar; None resets."""
    _handler.console = console


def say(text: str, *, style: str | None = None) -> None:
    """One line on stderr for the person at the terminal."""
    make_console(stderr=True).print(text, style=style, soft_wrap=True)


def human_count(value: float) -> str:
    """A count in three digits: 1234567 -> 1.23M."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def human_seconds(seconds: float | None) -> str:
    """A duration: 3.2 s, 4 min 05 s, 2 h 03 min."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
