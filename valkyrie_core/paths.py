"""File names that a user types."""

from __future__ import annotations

import os
from pathlib import Path

from valkyrie_core.errors import UsageError


def typed_path(name: str | Path) -> Path:
    """A path as typed, `~` replaced; whatever the system can't look up is a UsageError."""
    try:
        path = Path(name).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as error:
        # too long, a null byte, a user that is not there, a folder that may not be looked into
        reason = getattr(error, "strerror", None) or str(error)
        shown = str(name) if len(str(name)) <= 60 else f"{str(name)[:60]}..."
        raise UsageError(f"{shown!r} can't be used as a file name: {reason}") from error
    return path
