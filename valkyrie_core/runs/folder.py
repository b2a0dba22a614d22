"""A folder that belongs to one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from valkyrie_core.errors import ResourceError, RunInUseError


@contextmanager
def own_folder(folder: Path, work: str) -> Iterator[None]:
    """Makes the folder, and keeps other processes out of it meanwhile.

    Args:
        work: what another process would be doing there: "searches".

    Raises:
        ResourceError: it can't be made or written.
        RunInUseError: another process is in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder} can't be made: {error.strerror}") from error
    lock = FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUseError(f"another process {work} in {folder}") from None
    except OSError as error:
        raise ResourceError(f"{folder} can't be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
