"""The manifest of a checkpoint: every file with its size and checksum, and one of its own."""

from __future__ import annotations

import stat
from collections.abc import Collection
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from valkyrie_core.errors import CheckpointError

SCHEMA = 1
"""The layout of a checkpoint; a change of layout counts it up and adds a migration."""
MANIFEST = "MANIFEST.json"

_MAX_MANIFEST_BYTES = 65_536
_CHUNK_BYTES = 1 << 23


class FileEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    bytes: int = Field(ge=0)
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")


class Manifest(BaseModel):
    """What MANIFEST.json holds; `checksum` covers the rest of it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    schema_version: int
    step: int = Field(ge=0)
    files: dict[str, FileEntry]
    checksum: str

    @classmethod
    def of_directory(cls, directory: Path, step: int, names: Collection[str]) -> Manifest:
        """The manifest of the files as they stand on the disk."""
        files = {}
        for name in sorted(names):
            path = directory / name
            files[name] = FileEntry(bytes=path.stat().st_size, xxh3_128=_checksum(path))
        return cls(schema_version=SCHEMA, step=step, files=files, checksum="").sealed()

    def sealed(self) -> Manifest:
        """The same with the right checksum."""
        body = self.model_dump_json(exclude={"checksum"}).encode()
        return self.model_copy(update={"checksum": xxhash.xxh3_128(body).hexdigest()})

    def to_bytes(self) -> bytes:
        """The one form in which it is written: any other byte in the file is damage."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def verify_files(path: Path, step: int, names: Collection[str]) -> None:
    """Compare a directory with its manifest; CheckpointError or OSError where they differ."""
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} is not a directory of its own")
    manifest = _read_manifest(path / MANIFEST)
    if manifest.step != step:
        raise CheckpointError(f"{path} holds the checkpoint of step {manifest.step}")
    if manifest.files.keys() != set(names):
        raise CheckpointError(f"{path / MANIFEST} names other files than {sorted(names)}")
    for name, expected in sorted(manifest.files.items()):
        file = path / name
        size = _regular_file_size(file)
        if size != expected.bytes:
            raise CheckpointError(f"{file} has {size} bytes instead of {expected.bytes}")
    for name, expected in sorted(manifest.files.items()):
        if _checksum(path / name) != expected.xxh3_128:
            raise CheckpointError(f"{path / name} is damaged: its checksum is wrong")


def _read_manifest(path: Path) -> Manifest:
    if _regular_file_size(path) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is too large for a manifest")
    data = path.read_bytes()
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: it is no manifest") from error
    if manifest.sealed().to_bytes() != data:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong")
    if manifest.schema_version != SCHEMA:
        raise CheckpointError(
            f"{path.parent} has layout {manifest.schema_version}, this program reads {SCHEMA}",
            hint="update valkyrie-lab",
        )
    return manifest


def _regular_file_size(path: Path) -> int:
    """Bytes of a file; a symbolic link or anything else that is no plain file is refused."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
