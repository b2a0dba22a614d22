"""From an exception to an exit code and one helpful line."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from typer.exceptions import TyperException

from valkyrie_core import __version__
from valkyrie_core.errors import ValkyrieError

EXIT_CODES = {
    0: "fine",
    1: "a bug of ours",
    2: "usage",
    3: "a wrong recipe",
    4: "something named is missing",
    5: "no valid checkpoint",
    6: "diverged",
    7: "out of memory or disk",
    8: "the run is in use",
    9: "a gate asked for did not hold",
    75: "saved after a signal",
    130: "stopped hard",
    141: "the reader of the output went away",
}


class InterruptedHardError(ValkyrieError):
    """Ctrl-C where nothing is saved (or pressed twice)."""

    exit_code = 130


class OutputClosedError(ValkyrieError):
    """The reader of stdout or stderr went away."""

    exit_code = 141


@dataclass(frozen=True)
class Failure:
    """What a failed command tells."""

    type: str
    message: str
    hint: str | None
    exit_code: int

    def to_dict(self, schema: str) -> dict[str, Any]:
        """The JSON object of a failed command."""
        return {"schema": schema, "error": asdict(self)}


def _ran_out(error: BaseException) -> str | None:
    """What ran out (memory, disk), or None."""
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return "memory"
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return "memory"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "disk space"
        if error.errno == errno.ENOMEM:
            return "memory"
    return None


_RAN_OUT_HINTS = {
    "memory": "smaller micro-batches need less: --set train.grad_accum_steps=4, "
    "a smaller train.batch_size or train.context_len",
    "disk space": "free some space, then try again (valkyrie train goes on with --resume)",
}


def describe(error: BaseException) -> Failure:
    """The failure that an exception means. Writes a crash log if it is a bug of ours."""
    name = type(error).__name__
    if isinstance(error, ValkyrieError):
        return Failure(name, error.message, error.hint, error.exit_code)
    if isinstance(error, KeyboardInterrupt) or _was_stopped(error):
        return Failure("Interrupted", "stopped", None, 130)
    if isinstance(error, TyperException):
        return _usage_failure(error)
    resource = _ran_out(error)
    if resource is not None:
        first_line = str(error).strip().partition("\n")[0]
        detail = f": {first_line}" if first_line else ""
        return Failure("ResourceError", f"out of {resource}{detail}", _RAN_OUT_HINTS[resource], 7)
    if isinstance(error, PermissionError) or (
        isinstance(error, OSError) and error.errno == errno.EROFS
    ):
        place = error.filename if error.filename is not None else "a file"
        return Failure(name, f"{place}: {error.strerror or 'permission denied'}", None, 4)
    return Failure(
        name,
        f"a bug in valkyrie: {name}: {str(error).strip().partition(chr(10))[0]}",
        f"the traceback is in {write_crash_log(error)} (VALKYRIE_DEBUG=1 shows it here)",
        1,
    )


def _was_stopped(error: BaseException) -> bool:
    """Whether a signal came in the middle of an import, which may tell it as another error."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    # by its name: the class itself would import torch
    return any(type(cause).__name__ == "StopRequestedError" for cause in causes)


def _usage_failure(error: TyperException) -> Failure:
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None) or "valkyrie"
    return Failure(
        "UsageError", error.format_message().strip(), f"see '{path} --help'", error.exit_code
    )


def write_crash_log(error: BaseException) -> str:
    """Writes traceback and versions to a file in the temporary folder; returns its path."""
    lines = [
        f"valkyrie {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"arguments: {sys.argv[1:]}",
        "",
        *traceback.format_exception(error),
    ]
    try:
        descriptor, path = tempfile.mkstemp(prefix="valkyrie-crash-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError as problem:
        return f"nowhere (it could not be written: {problem})"
    return path


def schema_of(args: Sequence[str], commands: dict[str, set[str]]) -> str:
    """The schema name of the command in `args`: valkyrie.train/1, valkyrie.runs.list/1.

    `commands` maps every command to the names of its sub-commands.
    """
    words = [word for word in args if not word.startswith("-")]
    if not words or words[0] not in commands:
        return "valkyrie/1"
    parts = ["valkyrie", words[0]]
    if len(words) > 1 and words[1] in commands[words[0]]:
        parts.append(words[1])
    return ".".join(parts) + "/1"


def wants_json(args: Sequence[str]) -> bool:
    """Whether --json is among the options."""
    end = args.index("--") if "--" in args else len(args)
    return "--json" in args[:end]
