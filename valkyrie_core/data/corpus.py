"""Where text comes from: the closed union of corpora, and one way to read them all.

A new source of text is a new file in `readers/` with a config class that has `digest` and `read`,
and one line in the union below.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

from pydantic import Discriminator

from valkyrie_core.data.cache import cache_dir
from valkyrie_core.data.conversations import ChatterbotFormat, ChitchatFormat
from valkyrie_core.data.documents import Document, Drops, Piece, chat_pieces
from valkyrie_core.data.formats import ChatFormat, TextFormat
from valkyrie_core.data.holdout import (
    FilesHoldout,
    FractionHoldout,
    NamesHoldout,
    SplitHoldout,
)
from valkyrie_core.data.readers.arithmetic import ArithmeticCorpus
from valkyrie_core.data.readers.files import FilesCorpus
from valkyrie_core.data.readers.hub import HubCorpus
from valkyrie_core.data.readers.package import PackageCorpus
from valkyrie_core.data.readers.python import PythonCorpus
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.errors import MissingError, RecipeError

__all__ = [
    "ArithmeticCorpus",
    "ChatFormat",
    "ChatterbotFormat",
    "ChitchatFormat",
    "Corpus",
    "CorpusDocuments",
    "Document",
    "FilesCorpus",
    "FilesHoldout",
    "FractionHoldout",
    "HubCorpus",
    "NamesHoldout",
    "PackageCorpus",
    "Piece",
    "PythonCorpus",
    "QuestionsCorpus",
    "SplitHoldout",
    "TextFormat",
    "chat_pieces",
    "drop_leaks",
    "read_corpus",
]

log = logging.getLogger("valkyrie")

Corpus = Annotated[
    ArithmeticCorpus | FilesCorpus | HubCorpus | PackageCorpus | PythonCorpus | QuestionsCorpus,
    Discriminator("type"),
]


class CorpusDocuments(NamedTuple):
    """A corpus that was read and split; `dropped` counts what was left out, by reason."""

    train: list[Document]
    validation: list[Document]
    dropped: dict[str, int]


def read_corpus(name: str, corpus: Corpus, *, cache: Path | None = None) -> CorpusDocuments:
    """Reads, cleans and splits one corpus; the same order every time.

    Empty documents, exact duplicates inside a split and training documents that are also in the
    validation split are left out and counted. Raises MissingError where there is nothing to read,
    RecipeError where a split is empty or has nothing to score.
    """
    drops = Drops()
    try:
        documents, own_validation = corpus.read(cache or cache_dir(), drops)
        documents = _without_empty(documents, drops)
        if not documents:
            _raise_empty(name, "", drops)
        if isinstance(corpus.holdout, FractionHoldout | NamesHoldout):
            train, validation = corpus.holdout.split(documents)
        else:
            train, validation = documents, _without_empty(own_validation, drops)
    except RecipeError as error:
        raise RecipeError(f"data.corpora.{name}: {error.message}", hint=error.hint) from error
    train = _without_duplicates(train, drops)
    validation = _without_duplicates(validation, drops)
    train = drop_leaks(train, validation, drops)
    for reason, count in sorted(drops.items()):
        log.info("corpus %s: dropped %d (%s)", name, count, reason)
    for split, documents in (("training", train), ("validation", validation)):
        if not documents:
            _raise_empty(name, f"{split} ", drops)
        if not any(document.scored_bytes for document in documents):
            raise RecipeError(
                f"data.corpora.{name}: nothing to score in the {split} documents",
                hint="a conversation needs at least one answer",
            )
    return CorpusDocuments(train, validation, dict(sorted(drops.items())))


def drop_leaks(train: list[Document], held: Iterable[Document], drops: Drops) -> list[Document]:
    """The training documents that are not also among those held out; the others are counted."""
    hashes = {document.content_hash for document in held}
    kept = [document for document in train if document.content_hash not in hashes]
    if len(kept) < len(train):
        drops["also in validation"] += len(train) - len(kept)
    return kept


def _without_empty(documents: list[Document], drops: Drops) -> list[Document]:
    kept = [d for d in documents if any(piece.text.strip() for piece in d.pieces)]
    if len(kept) < len(documents):
        drops["empty"] += len(documents) - len(kept)
    return kept


def _without_duplicates(documents: list[Document], drops: Drops) -> list[Document]:
    kept: dict[str, Document] = {}
    for document in documents:
        kept.setdefault(document.content_hash, document)
    if len(kept) < len(documents):
        drops["duplicate"] += len(documents) - len(kept)
    return list(kept.values())


def _raise_empty(name: str, split: str, drops: Drops) -> NoReturn:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))
    raise MissingError(
        f"data.corpora.{name}: no {split}documents are left"
        + (f" (dropped: {reasons})" if reasons else ""),
        hint="check the corpus's paths, format and holdout",
    )
