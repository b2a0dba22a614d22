"""The corpus `python`: what every Python carries, so it needs no download at all."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.cache import fingerprint
from valkyrie_core.data.documents import Document, Drops, text_document
from valkyrie_core.data.formats import Source, TextFormat
from valkyrie_core.data.holdout import DocumentHoldout, FractionHoldout
from valkyrie_core.errors import MissingError

# tests are not prose that people write code after; pydoc_data is the part `documentation`
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}


class PythonCorpus(Config):
    """What every Python carries: the standard library's source and its documentation."""

    type: Literal["python"] = "python"
    parts: tuple[Literal["source", "documentation"], ...] = Field(
        default=("source", "documentation"), min_length=1
    )
    """Source files, and the topics that `help()` shows."""
    max_documents: int | None = Field(default=None, ge=2)
    """Only the first documents in the order of their names; all if left out."""
    format: TextFormat = TextFormat()
    """Always text."""
    holdout: DocumentHoldout = FractionHoldout()
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""

    def digest(self, cache: Path) -> str:
        """A hash of all names and contents: another Python version is another corpus."""
        return fingerprint([[d.name, d.content_hash] for d in self._documents(Drops())])

    def read(self, cache: Path, drops: Drops) -> tuple[list[Document], list[Document]]:
        """The documents, named `documentation/TOPIC` and `source/PATH`."""
        return self._documents(drops), []

    def _documents(self, drops: Drops) -> list[Document]:
        documents: list[Document] = []
        if "documentation" in self.parts:
            documents += _documentation()
        if "source" in self.parts:
            documents += _source(drops)
        documents.sort(key=lambda document: document.name)
        if self.max_documents is not None and len(documents) > self.max_documents:
            drops["over max_documents"] += len(documents) - self.max_documents
            documents = documents[: self.max_documents]
        return documents


def _documentation() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingError(
            "this Python comes without its documentation (pydoc_data)",
            hint="use parts: [source], or another Python",
        ) from error
    for name, text in topics.items():
        yield text_document(f"documentation/{name}", text)


def _source(drops: Drops) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for name in names:
            # _sysconfigdata differs from machine to machine
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            found = True
            source = Source(f"source/{relative}", path.read_bytes())
            if (text := source.decode(drops)) is not None:
                yield text_document(source.name, text)
    if not found:
        raise MissingError(
            f"this Python comes without the source of its standard library (looked in {root})",
            hint="use parts: [documentation], or another Python",
        )
