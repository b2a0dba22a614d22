"""Which documents are kept for validation. Splits are by document, never inside one."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from valkyrie_core.config import Config
from valkyrie_core.data.documents import Document
from valkyrie_core.errors import RecipeError

log = logging.getLogger("valkyrie")

Split = tuple[list[Document], list[Document]]
"""(training documents, validation documents)"""


class FractionHoldout(Config):
    """Holds out a fraction of the documents, chosen by a hash of their content.

    A document's side depends on its own content alone: adding others doesn't move it.
    """

    type: Literal["fraction"] = "fraction"
    fraction: float = Field(default=0.05, gt=0, lt=1)
    """The share of documents that is held out for validation."""

    def split(self, documents: list[Document]) -> Split:
        """Never leaves a side empty. Raises RecipeError where there is only one document."""
        hashes = [document.content_hash for document in documents]
        unique = sorted(set(hashes))
        if len(unique) < 2:
            raise RecipeError(
                "there is only one document, so none can be held out for validation",
                hint="cut it into several files, or name a file of its own with "
                "holdout: {type: files, paths: [...]}",
            )
        limit = self.fraction * 2.0**64
        held = {value for value in unique if int(value[:16], 16) < limit} or {unique[0]}
        if len(held) == len(unique):
            held.remove(unique[-1])
        return _divide(documents, [value in held for value in hashes])


class NamesHoldout(Config):
    """Holds out the documents whose name matches a pattern."""

    type: Literal["names"] = "names"
    names: tuple[str, ...] = Field(min_length=1)
    """Shell patterns, matched against document names, case ignored."""

    def split(self, documents: list[Document]) -> Split:
        """Raises RecipeError where a pattern matches nothing, or all patterns match everything."""
        held = [False] * len(documents)
        for pattern in self.names:
            matches = [_matches(document.name, pattern) for document in documents]
            if not any(matches):
                raise RecipeError(
                    f"holdout.names: {pattern!r} matches none of {len(documents)} documents",
                    hint=_nearest(pattern, [document.name for document in documents]),
                )
            held = [a or b for a, b in zip(held, matches, strict=True)]
        if all(held):
            raise RecipeError(
                f"holdout.names: {', '.join(self.names)} holds out every document",
                hint="nothing is left to train on; use a narrower pattern",
            )
        return _divide(documents, held)


class FilesHoldout(Config):
    """Validates on files of their own (only for `files` corpora)."""

    type: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs that hold the validation text."""


class SplitHoldout(Config):
    """Validates on another split of the same data set (only for `hub` corpora)."""

    type: Literal["split"] = "split"
    split: str = "validation"
    """The name of the split."""


DocumentHoldout = Annotated[FractionHoldout | NamesHoldout, Discriminator("type")]
"""What every corpus can do: choose among its own documents."""


def _divide(documents: list[Document], held: list[bool]) -> Split:
    pairs = list(zip(documents, held, strict=True))
    return [d for d, out in pairs if not out], [d for d, out in pairs if out]


def _matches(name: str, pattern: str) -> bool:
    name, pattern = name.casefold(), pattern.casefold()
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(
        PurePosixPath(name).name, pattern
    )


def _nearest(pattern: str, names: list[str]) -> str:
    # compared without path and wildcards: what a person remembers is "macbeth"
    by_stem = {PurePosixPath(name).stem.casefold(): name for name in reversed(names)}
    bare = PurePosixPath(pattern.replace("*", "").replace("?", "")).stem.casefold()
    near = difflib.get_close_matches(bare, list(by_stem), n=1, cutoff=0.4)
    if near:
        return f"did you mean {by_stem[near[0]]!r}? patterns may hold * and ?"
    return f"the documents are named like {names[0]!r}; patterns may hold * and ?"
