"""The corpus `files`: text in files, folders and globs."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from valkyrie_core.config import Config
from valkyrie_core.data.cache import file_digest, fingerprint
from valkyrie_core.data.conversations import ChatterbotFormat, ChitchatFormat
from valkyrie_core.data.documents import Document, Drops
from valkyrie_core.data.formats import ChatFormat, Source, TextFormat
from valkyrie_core.data.holdout import FilesHoldout, FractionHoldout, NamesHoldout
from valkyrie_core.errors import MissingError

FileFormat = Annotated[
    TextFormat | ChatFormat | ChitchatFormat | ChatterbotFormat, Discriminator("type")
]


class FilesCorpus(Config):
    """Text in files: txt, md, py, jsonl, parquet; files, folders and globs."""

    type: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (read recursively) or globs, relative to the current folder."""
    format: FileFormat = TextFormat()
    """How a file's content becomes documents."""
    holdout: Annotated[FractionHoldout | NamesHoldout | FilesHoldout, Discriminator("type")] = (
        FractionHoldout()
    )
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""

    def digest(self, cache: Path) -> str:
        """A hash of all names and contents. Raises MissingError where a path matches nothing."""
        train, validation = self._files()
        try:
            return fingerprint(
                [
                    [[_name(path), file_digest(path)] for path in side]
                    for side in (train, validation)
                ]
            )
        except OSError as error:
            raise _unreadable(error) from error

    def read(self, cache: Path, drops: Drops) -> tuple[list[Document], list[Document]]:
        """All documents, and those of the hold-out's own files; in the order of their names."""
        files, held = self._files()
        return list(self._documents(files, drops)), list(self._documents(held, drops))

    def _files(self) -> tuple[list[Path], list[Path]]:
        files = find_files(self.paths, self.format.suffixes)
        if not isinstance(self.holdout, FilesHoldout):
            return files, []
        held = find_files(self.holdout.paths, self.format.suffixes)
        resolved = {path.resolve() for path in held}
        return [path for path in files if path.resolve() not in resolved], held

    def _documents(self, files: Iterable[Path], drops: Drops) -> Iterator[Document]:
        for path in files:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise _unreadable(error) from error
            yield from self.format.documents(Source(_name(path), data), drops)


def find_files(patterns: Iterable[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Every file that files, folders and globs name, once each, in the order of the names.

    A folder gives its files with one of `suffixes`, also in folders inside it, but nothing hidden;
    a file or a glob gives what it names. Raises MissingError where one of them gives nothing.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [file for match in matches for file in _expanded(match, suffixes)]
        if not files:
            raise _nothing(pattern, path, suffixes)
        for file in files:
            found.setdefault(file.resolve(), file)
    return sorted(found.values(), key=_name)


def _expanded(path: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield Path(folder, name)


def _name(path: Path) -> str:
    # names are shown and matched: bytes that are no UTF-8 (surrogates) would break both
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _nothing(pattern: str, path: Path, suffixes: tuple[str, ...]) -> MissingError:
    if path.is_dir():
        return MissingError(
            f"{pattern}: no file that ends with {', '.join(suffixes)} in this folder",
            hint="name the files, or a glob such as 'folder/*.rst'",
        )
    parent = path.parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = (
        f"did you mean {(parent / near[0]).as_posix()}?"
        if near
        else (f"paths are relative to the current folder, {Path.cwd()}")
    )
    return MissingError(f"{pattern}: no such file or folder", hint=hint)


def _unreadable(error: OSError) -> MissingError:
    return MissingError(f"{error.filename}: can't be read ({error.strerror})")
