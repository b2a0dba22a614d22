"""Writing files so that a crash or a full disk never costs more than the file being written.

Every operation goes through one `Storage`, whose `hook` is called before and after it. Tests put
a SIGKILL, a full disk or a recorder there; a run leaves it empty.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

Hook = Callable[[str, Path], None]
"""Called as hook("before write", path) and hook("after write", path)."""


def _no_hook(_event: str, _path: Path) -> None:
    """What a run uses."""


class Storage:
    """The file operations of checkpoints and run directories; each is one call of the system."""

    def __init__(self, hook: Hook = _no_hook) -> None:
        self._hook = hook
        # the mask can only be read by setting it; once, before any thread could see the zero
        mask = os.umask(0)
        os.umask(mask)
        self._mode = 0o666 & ~mask

    def make_directory(self, path: Path) -> None:
        """Create one directory; its parent exists."""
        self._hook("before mkdir", path)
        path.mkdir()
        self._hook("after mkdir", path)

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write a whole file."""
        self._hook("before write", path)
        path.write_bytes(data)
        self._hook("after write", path)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file, readable as the umask says (the library leaves it 0600)."""
        self._hook("before write", path)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        self._hook("after write", path)
        path.chmod(self._mode)
        self._hook("after chmod", path)

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of a file in one write."""
        self._hook("before append", path)
        with path.open("ab", buffering=0) as file:
            file.write(data)
        self._hook("after append", path)

    def sync(self, path: Path) -> None:
        """Force a file or a directory to the disk."""
        self._hook("before fsync", path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._hook("after fsync", path)

    def rename(self, source: Path, target: Path) -> None:
        """Move within one file system, in one step; a file at `target` is replaced."""
        self._hook("before rename", target)
        source.replace(target)
        self._hook("after rename", target)

    def remove_tree(self, path: Path) -> None:
        """Delete a directory and what is in it, or a file; a link is removed, never followed."""
        self._hook("before remove", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        self._hook("after remove", path)

    def replace_bytes(self, path: Path, data: bytes) -> None:
        """Give a file new content: a reader sees the old or the new, whatever happens."""
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            self.write_bytes(temporary, data)
            self.sync(temporary)
            self.rename(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        self.sync(path.parent)

    def replace_json(self, path: Path, value: Any) -> None:
        """Like `replace_bytes`, with indented JSON; NaN and Inf are refused (they are no JSON)."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.replace_bytes(path, text.encode() + b"\n")
