"""The corpus `hub`: a Hugging Face data set, read through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field

from valkyrie_core.config import Config
from valkyrie_core.data.cache import file_digest, fingerprint
from valkyrie_core.data.documents import Document, Drops
from valkyrie_core.data.formats import ChatFormat, Row, TextFormat
from valkyrie_core.data.holdout import FractionHoldout, NamesHoldout, SplitHoldout
from valkyrie_core.errors import MissingError


class HubCorpus(Config):
    """A Hugging Face data set by name, or a local folder in the same layout."""

    type: Literal["hub"] = "hub"
    dataset: str = Field(min_length=1)
    """The name on the hub (owner/name), or a local folder."""
    config_name: str | None = None
    """The configuration of the data set, where it has several."""
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """A commit of the data set: pins its content, and needs no look at the hub once cached."""
    split: str = Field(default="train", min_length=1)
    """The split to train on."""
    format: Annotated[TextFormat | ChatFormat, Discriminator("type")] = TextFormat()
    """How a row becomes a document."""
    holdout: Annotated[FractionHoldout | NamesHoldout | SplitHoldout, Discriminator("type")] = (
        FractionHoldout()
    )
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""

    def digest(self, cache: Path) -> str:
        """A local folder's files, the pinned commit, or else the rows themselves, hashed."""
        folder = Path(self.dataset).expanduser()
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return fingerprint(
                [[path.relative_to(folder).as_posix(), file_digest(path)] for path in files]
            )
        if self.revision is not None:
            return self.revision
        train, validation = self.read(cache, Drops())
        return fingerprint([[d.name, d.content_hash] for d in (*train, *validation)])

    def read(self, cache: Path, drops: Drops) -> tuple[list[Document], list[Document]]:
        """All documents of the split, and those of the hold-out's; named `split:row`."""
        held = self.holdout.split if isinstance(self.holdout, SplitHoldout) else None
        return (
            list(self._documents(self.split, drops)),
            list(self._documents(held, drops)) if held is not None else [],
        )

    def _documents(self, split: str, drops: Drops) -> Iterator[Document]:
        rows = self._load(split)
        named: Iterator[tuple[str, Row]] = (
            (f"{split}:{number}", row) for number, row in enumerate(rows, start=1)
        )
        yield from self.format.rows(named, drops)

    def _load(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        name = str(Path(self.dataset).expanduser()) if self.dataset[:1] == "~" else self.dataset
        try:
            return datasets.load_dataset(
                name, name=self.config_name, split=split, revision=self.revision
            )
        except (ValueError, OSError, KeyError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise MissingError(
                f"hub data set {self.dataset!r}, split {split!r}: {reason[0]}",
                hint="check the name, config_name and split, and whether the hub can be reached",
            ) from error
