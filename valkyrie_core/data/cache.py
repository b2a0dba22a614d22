"""The cache: where it is, and how a folder gets into it whole or not at all.

An entry is written into a temporary folder, every file is fsynced, a manifest with sizes and
checksums comes last, then the folder is renamed. Whoever opens an entry checks all of it, so a
damaged one is noticed and never read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import xxhash
from filelock import FileLock, Timeout

from valkyrie_core.cache import cache_dir as cache_dir
from valkyrie_core.errors import MissingError, ResourceError

log = logging.getLogger("valkyrie")

MANIFEST = "manifest.json"
_CHUNK = 1 << 22


Value = TypeVar("Value")


class DamagedError(Exception):
    """A cache entry is not what its manifest says."""


def fingerprint(value: Any) -> str:
    """A hash of a JSON-like value; the same for equal values in any process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def raise_storage_error(error: OSError, what: Path) -> NoReturn:
    """Turns a failed write into a line that helps: disk full, or not allowed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise ResourceError(
            f"no space left to write {what}",
            hint="free some space, or point VALKYRIE_CACHE at another disk",
        ) from error
    raise MissingError(
        f"can't write {what}: {error.strerror or error}",
        hint="set VALKYRIE_CACHE to a folder that you may write to",
    ) from error


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file that is whole or not there: temporary name, fsync, rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def sync_dir(directory: Path) -> None:
    """Makes renames in a folder durable, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def locked(root: Path, kind: str, key: str) -> Iterator[Path]:
    """Holds the lock of one cache entry; yields the folder that its kind lives in."""
    folder = root / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that prepares %s/%s", kind, key)
            lock.acquire()
    except OSError as error:
        raise_storage_error(error, folder)
    try:
        yield folder
    finally:
        lock.release()


def commit(folder: Path, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
    """Writes the entry `key` into `folder`; the caller holds its lock.

    `write` fills a temporary folder and returns what its manifest says besides the files.
    Leftovers of killed writers and a damaged entry of the same key are removed.
    """
    for leftover in folder.glob(f".tmp-{key}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = folder / key
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".tmp-{key}-"))
    try:
        temporary.chmod(0o777 & ~_umask())
        _seal(temporary, write(temporary))
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
        sync_dir(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise_storage_error(error, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _seal(directory: Path, content: dict[str, Any]) -> None:
    files = {}
    folders = {directory}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        folders.add(path.parent)
        name = path.relative_to(directory).as_posix()
        files[name] = {"size": path.stat().st_size, "xxh3": file_digest(path)}
    body = {"files": files, "content": content}
    manifest = {"checksum": fingerprint(body), **body}
    write_synced(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    for folder in folders:
        sync_dir(folder)


def open_entry(directory: Path) -> dict[str, Any] | None:
    """The content of an entry's manifest after a check of every file; None: no such entry.

    Raises DamagedError, which says what is wrong, where the entry is not what was written.
    """
    if not directory.exists():
        return None
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        checksum, files, content = manifest["checksum"], manifest["files"], manifest["content"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} can't be read ({error})") from error
    if checksum != fingerprint({"files": files, "content": content}):
        raise DamagedError(f"{MANIFEST} has changed")
    for name, expected in files.items():
        path = directory / name
        try:
            if path.stat().st_size != expected["size"]:
                raise DamagedError(f"{name} has the wrong size")
            if file_digest(path) != expected["xxh3"]:
                raise DamagedError(f"{name} has changed")
        except OSError as error:
            raise DamagedError(f"{name} can't be read ({error.strerror})") from error
    result: dict[str, Any] = content
    return result


def cached(
    root: Path,
    kind: str,
    key: str,
    write: Callable[[Path], dict[str, Any]],
    read: Callable[[Path, dict[str, Any]], Value],
    *,
    anew: bool = False,
) -> tuple[Path, Value]:
    """Opens an entry of the cache; writes it first where it is missing, damaged or not wanted."""
    with locked(root, kind, key) as folder:
        directory = folder / key
        try:
            content = None if anew else open_entry(directory)
        except DamagedError as error:
            log.warning("the cache entry %s is damaged (%s); it is built again", directory, error)
            content = None
        if content is None:
            directory = commit(folder, key, write)
            content = open_entry(directory)
        if content is None:
            raise MissingError(f"{directory} vanished while it was opened")
        return directory, read(directory, content)
