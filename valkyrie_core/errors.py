"""What can go wrong that is not a bug: one class per exit code of the command line."""

from __future__ import annotations


class ValkyrieError(Exception):
    """A mistake or a shortage that one helpful line explains.

    `hint` says what to do next; the command line prints it on its own line and exits with
    `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ValkyrieError):
    """The command was called in a way that can't be carried out."""

    exit_code = 2


class RecipeError(ValkyrieError):
    """A recipe is wrong; the message holds one located line per mistake."""

    exit_code = 3


class MissingError(ValkyrieError):
    """Something named is not there: a run, a file, a package, an extra."""

    exit_code = 4


class CheckpointError(ValkyrieError):
    """No valid checkpoint could be read."""

    exit_code = 5


class DivergedError(ValkyrieError):
    """The loss or a gradient stopped being finite."""

    exit_code = 6


class ResourceError(ValkyrieError):
    """Memory or disk ran out."""

    exit_code = 7


class RunInUseError(ValkyrieError):
    """Another process writes to this run."""

    exit_code = 8


class GateError(ValkyrieError):
    """A gate that the caller asked for did not hold."""

    exit_code = 9


class StoppedError(ValkyrieError):
    """Stopped by a signal, after saving; the hint is the command that goes on."""

    exit_code = 75
