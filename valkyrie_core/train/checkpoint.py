"""Checkpoints that survive crashes, full disks and bad sectors: safetensors and JSON, no pickle.

    checkpoints/.tmp-step-000500-<pid>/   model.safetensors  training.safetensors  meta.json
                                          MANIFEST.json (size and xxh3_128 of each, written last)
    checkpoints/step-000500/              the same, renamed once everything is on the disk

A directory named step-N is complete by construction; what happens to it afterwards (a flipped
bit, a truncated copy) is found by the manifest, which also guards itself. safetensors alone does
not notice a flipped bit in a tensor.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from valkyrie_core.errors import CheckpointError, ResourceError
from valkyrie_core.train.manifest import MANIFEST, Manifest, verify_files
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

META = "meta.json"
MODEL = "model.safetensors"
TRAINING = "training.safetensors"
FILES = frozenset({META, MODEL, TRAINING})

_NAME = re.compile(r"step-(\d{6,12})")
_TRANSIENT = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT})
_ATTEMPTS = 3
_BACKOFF_SECONDS = 0.2


class Checkpoint(NamedTuple):
    """A verified checkpoint; its tensors are read when asked for."""

    path: Path
    step: int
    meta: dict[str, Any]

    def model_tensors(self) -> StoredTensors:
        """The weights, by name."""
        return StoredTensors(self.path / MODEL)

    def training_tensors(self) -> StoredTensors:
        """Optimizer state and random number generators, by name."""
        return StoredTensors(self.path / TRAINING)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file; each is read when it is asked for.

    A second copy of everything may not fit beside the model. Read, not mapped: mapped pages count
    as the process's own until something else needs the memory.
    """

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt", backend="pread")
        self._names = list(self._file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Search(NamedTuple):
    """What `newest_valid` found: a checkpoint, and the newer ones it had to pass over."""

    checkpoint: Checkpoint | None
    damaged: tuple[Path, ...]


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return directory / f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that is named like a checkpoint, newest first, unverified."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path == step_directory(directory, int(match[1])):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    storage: Storage,
) -> Path:
    """Write the checkpoint of `step` and return its directory; one that exists is replaced.

    What was written is read back and compared with memory before it gets its name. Errors of the
    disk that may pass are tried again; then ResourceError, with the temporary files removed and
    older checkpoints untouched.
    """
    final = step_directory(directory, step)
    files = {MODEL: model, TRAINING: training}
    for attempt in range(1, _ATTEMPTS + 1):
        temporary = directory / f".tmp-{final.name}-{os.getpid()}"
        try:
            if temporary.exists():
                storage.remove_tree(temporary)
            _write(temporary, step, files, meta, storage)
            _publish(temporary, final, storage)
            return final
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                storage.remove_tree(temporary)
            if attempt < _ATTEMPTS and isinstance(error, OSError) and error.errno in _TRANSIENT:
                log.warning("writing %s failed (%s), trying again", final, error)
                time.sleep(_BACKOFF_SECONDS * 2**attempt)
                continue
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ResourceError(
                f"the checkpoint of step {step} could not be written to {directory}: {reason}",
                hint="older checkpoints are intact; make room, then go on with --resume",
            ) from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def _write(
    temporary: Path,
    step: int,
    tensor_files: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    storage: Storage,
) -> None:
    """Everything but the final name: files, manifest, all of it on the disk and read back."""
    storage.make_directory(temporary)
    for name, tensors in tensor_files.items():
        storage.write_tensors(temporary / name, tensors)
        storage.sync(temporary / name)
        _compare(temporary / name, tensors)
    data = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    storage.write_bytes(temporary / META, data)
    storage.sync(temporary / META)
    if (temporary / META).read_bytes() != data:
        raise OSError(errno.EIO, f"{META} reads back differently")
    manifest = Manifest.of_directory(temporary, step, FILES)
    storage.write_bytes(temporary / MANIFEST, manifest.to_bytes())
    storage.sync(temporary / MANIFEST)
    storage.sync(temporary)
    try:
        verify_files(temporary, step, FILES)
    except CheckpointError as error:
        raise OSError(errno.EIO, f"it reads back differently: {error}") from error


def _publish(temporary: Path, final: Path, storage: Storage) -> None:
    """Give a complete checkpoint its name; an older one of the same name makes way."""
    old = final.with_name(f".old-{final.name}")
    replaces = os.path.lexists(final)
    if replaces:
        if os.path.lexists(old):
            storage.remove_tree(old)
        storage.rename(final, old)
    storage.rename(temporary, final)
    storage.sync(final.parent)
    if replaces:
        storage.remove_tree(old)


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise OSError where the file does not hold exactly these tensors, bit for bit."""
    stored = StoredTensors(path)
    same = stored.keys() == tensors.keys()
    if not same or not all(_equal(stored[name], tensor) for name, tensor in tensors.items()):
        raise OSError(errno.EIO, f"{path.name} reads back differently")


def _equal(one: Tensor, other: Tensor) -> bool:
    """The same bits; equality of floats would call two equal NaN different."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_as_bytes(one), _as_bytes(other))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def verify(path: Path) -> Checkpoint:
    """Check every byte of a checkpoint against its manifest and read its meta data.

    Raises CheckpointError, naming the file and what is wrong with it.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint (step-000500)")
    step = int(match[1])
    try:
        verify_files(path, step, FILES)
        meta = json.loads((path / META).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / META} is no JSON: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path / META} is no JSON object")
    return Checkpoint(path, step, meta)


def newest_valid(directory: Path) -> Search:
    """The newest checkpoint whose every byte is right; falling back is announced.

    No checkpoint at all gives `checkpoint=None`; checkpoints of which none is valid are a
    CheckpointError: a run never silently starts again from scratch.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for _, path in list_checkpoints(directory):
        try:
            checkpoint = verify(path)
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
            damaged.append((path, error))
            continue
        if damaged:
            log.warning("falling back to the older checkpoint %s", checkpoint.path)
        return Search(checkpoint, tuple(path for path, _ in damaged))
    if damaged:
        reasons = "; ".join(str(error) for _, error in damaged[:3])
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {directory} is valid: {reasons}",
            hint="restore one from a backup, or start a new run with --set name=NEW",
        )
    return Search(None, ())


def set_aside(paths: Collection[Path], storage: Storage) -> None:
    """Rename damaged checkpoints to damaged-step-N, so that pruning never counts them."""
    for path in paths:
        target = path.with_name(f"damaged-{path.name}")
        if os.path.lexists(target):
            storage.remove_tree(target)
        log.warning("the damaged checkpoint is kept as %s", target)
        storage.rename(path, target)


def prune(
    directory: Path, *, keep_last: int, keep_steps: Collection[int], storage: Storage
) -> None:
    """Remove all checkpoints but the newest `keep_last` and those of `keep_steps`."""
    for step, path in list_checkpoints(directory)[keep_last:]:
        if step in keep_steps:
            continue
        # renamed first: a half deleted directory must not look like a checkpoint
        dead = path.with_name(f".del-{path.name}-{os.getpid()}")
        storage.rename(path, dead)
        storage.remove_tree(dead)


def remove_leftovers(directory: Path, storage: Storage) -> None:
    """Tidy what a killed process left behind; only the owner of the run's lock may call it."""
    for old in directory.glob(".old-step-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if not os.path.lexists(final):
            storage.rename(old, final)  # killed between the two renames that replace a checkpoint
    for pattern in (".tmp-*", ".del-*", ".old-*"):
        for path in directory.glob(pattern):
            storage.remove_tree(path)
