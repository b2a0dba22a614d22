"""Text from the person or the pipe: whole messages out of lines."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator

from valkyrie_core.errors import UsageError

ReadLine = Callable[[str], str | None]
"""Shows a prompt and returns a line without its end, or None at the end of the input."""

QUOTES = '"""'


def _prepare_stdin() -> None:
    # bytes that are no UTF-8 become U+FFFD instead of an exception in the middle of a chat
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


def read_stdin() -> str:
    """All of stdin."""
    _prepare_stdin()
    return sys.stdin.read()


def piped_lines() -> ReadLine:
    """Reads lines of stdin without showing anything."""
    _prepare_stdin()

    def read_line(prompt: str) -> str | None:
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None

    return read_line


def terminal_lines() -> ReadLine:
    """Reads lines from the terminal, with history and editing where readline is there."""
    _prepare_stdin()
    try:
        import readline  # noqa: F401  (importing it gives input() its line editor)
    except ImportError:
        return _without_editor
    return _with_editor if sys.stdout.isatty() else _without_editor


def _with_editor(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None


def _without_editor(prompt: str) -> str | None:
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def read_message(read_line: ReadLine) -> str | None:
    r"""The next message, or None at the end of the input.

    A line that ends with a backslash goes on in the next one; a line that starts with three double
    quotes opens a message that ends where three double quotes end a line.
    """
    line = read_line("> ")
    if line is None:
        return None
    if line.startswith(QUOTES):
        return _quoted(line.removeprefix(QUOTES), read_line)
    parts = []
    while line is not None and line.endswith("\\"):
        parts.append(line[:-1])
        line = read_line(". ")
    if line is not None:
        parts.append(line)
    return "\n".join(parts)


def _quoted(line: str | None, read_line: ReadLine) -> str:
    parts = []
    while line is not None:
        if line.rstrip().endswith(QUOTES):
            parts.append(line.rstrip().removesuffix(QUOTES))
            break
        parts.append(line)
        line = read_line(". ")
    return "\n".join(parts).strip("\n")


def messages(read_line: ReadLine) -> Iterator[str]:
    """All messages that hold more than white space."""
    while (message := read_message(read_line)) is not None:
        if message.strip():
            yield message


def one_prompt(option: str | None) -> str:
    """The prompt of a one-shot command: the option, or stdin for `-` and for a pipe.

    A pipe's last newline belongs to the shell's `echo`, not to the text.
    """
    if option is not None and option != "-":
        return option
    if option is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt", hint='give one: --prompt "Once upon", or pipe one in'
        )
    return read_stdin().removesuffix("\n").removesuffix("\r")
