"""Which text a run is asked to read at length: one document, never several joined."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from valkyrie_core.data.dataset import DataConfig, Dataset
from valkyrie_core.data.documents import clean_text
from valkyrie_core.data.readers.python import PythonCorpus
from valkyrie_core.data.tokenizer import Tokenizer, opening
from valkyrie_core.errors import MissingError, UsageError

log = logging.getLogger("valkyrie")


class LongText(NamedTuple):
    """One document as tokens, its marker first."""

    name: str
    tokens_T: npt.NDArray[np.int64]
    seen: bool = False
    """Whether the run was trained on some of it."""


def longest_validation_document(dataset: Dataset) -> LongText:
    """The longest document that the run was not trained on, of all corpora."""
    longest = LongText("", np.zeros(0, dtype=np.int64))
    for corpus_name, corpus in dataset.corpora.items():
        split = corpus.validation
        lengths = np.diff(split.doc_starts)
        index = int(lengths.argmax())
        if lengths[index] > len(longest.tokens_T):
            start, end = int(split.doc_starts[index]), int(split.doc_starts[index + 1])
            tokens_T = np.asarray(split.tokens[start:end]).astype(np.int64)
            longest = LongText(f"{corpus_name}: {split.names[index]}", tokens_T)
    return longest


def choose(dataset: Dataset, config: DataConfig, needed: int) -> LongText:
    """The run's longest validation document, or Python's documentation where that is too short.

    Args:
        dataset, config: what the run was trained on.
        needed: tokens that the text has at least.

    Raises:
        UsageError: neither has `needed` tokens.
        MissingError: this Python has no documentation.
    """
    own = longest_validation_document(dataset)
    if len(own.tokens_T) >= needed:
        return own
    log.warning(
        "the longest validation document has %s tokens, %s are needed: reading the documentation "
        "that this Python carries instead (--text names another file)",
        f"{len(own.tokens_T):,}",
        f"{needed:,}",
    )
    found = tokenised(
        "the Python documentation", documentation(), dataset.tokenizer, config.memory_tokens
    )
    seen = any(
        isinstance(corpus, PythonCorpus) and "documentation" in corpus.parts
        for corpus in config.corpora.values()
    )
    if seen:
        log.warning("the run was trained on parts of it: its losses say little about other texts")
    return long_enough(found._replace(seen=seen), needed)


def read_file(path: Path, tokenizer: Tokenizer, needed: int, memory_tokens: int) -> LongText:
    """A text file of the user's.

    Raises:
        MissingError: it can't be read.
        UsageError: it is not UTF-8, or has fewer than `needed` tokens.
    """
    return long_enough(tokenised(str(path), read_utf8(path), tokenizer, memory_tokens), needed)


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        MissingError: it can't be read.
        UsageError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MissingError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start})", hint="convert it first"
        ) from error


def documentation() -> str:
    """The topics that Python's `help()` shows, in the order of their names, as one text."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingError(
            "no validation document is long enough, and this Python comes without documentation",
            hint="name a long text with --text FILE",
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenised(name: str, text: str, tokenizer: Tokenizer, memory_tokens: int) -> LongText:
    """A text with what begins a document."""
    ids = [*opening(tokenizer, memory_tokens), *tokenizer.encode(clean_text(text))]
    return LongText(name, np.array(ids, dtype=np.int64))


def long_enough(found: LongText, needed: int) -> LongText:
    """The text, or the error that says how much of it there is."""
    if len(found.tokens_T) < needed:
        raise UsageError(
            f"{found.name} has {len(found.tokens_T):,} tokens; {needed:,} are needed",
            hint="ask for a shorter context, or name a longer text with --text FILE",
        )
    return found
