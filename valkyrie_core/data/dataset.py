"""From corpora to packed, memory-mapped tokens, cached by the fingerprint of what they are.

The fingerprint covers the content of every corpus, its configuration, the tokenizer and the
format of the files: when one of them changes, the data is packed anew.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.cache import (
    cache_dir,
    cached,
    fingerprint,
)
from valkyrie_core.data.corpus import Corpus, CorpusDocuments, drop_leaks, read_corpus
from valkyrie_core.data.documents import Document, Drops, Progress
from valkyrie_core.data.packing import PackedSplit, open_split, token_lengths, write_split
from valkyrie_core.data.tokenizer import (
    SentencePieceConfig,
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
)
from valkyrie_core.errors import RecipeError

log = logging.getLogger("valkyrie")

FORMAT = 1
"""The layout of the packed files; part of every fingerprint."""
TRAINING = 2
"""How a tokenizer is trained; part of the key that a trained one is cached under."""


class DataConfig(Config):
    """The text of an experiment: a weighted mixture of corpora and one tokenizer."""

    corpora: dict[str, Corpus] = Field(min_length=1)
    """Named corpora; the names appear in reports."""
    tokenizer: TokenizerConfig = SentencePieceConfig()
    """How text becomes tokens."""
    memory_tokens: int = Field(default=0, ge=0)
    """Empty tokens at the beginning of every document; a recipe leaves it out and takes the
    model's."""


@dataclass(frozen=True)
class PackedCorpus:
    """One corpus, tokenised and split; `train.counts` and `validation.counts` say how much."""

    name: str
    train: PackedSplit
    validation: PackedSplit
    dropped: dict[str, int]
    """Documents that were left out, by reason."""

    @property
    def truncated(self) -> int:
        """Documents that were cut, in both splits."""
        return self.train.counts.truncated + self.validation.counts.truncated


@dataclass(frozen=True)
class Dataset:
    """Everything that a run learns from and is validated on."""

    corpora: dict[str, PackedCorpus]
    tokenizer: Tokenizer
    fingerprint: str
    """Equal exactly if tokens, documents and their order are."""
    weights: dict[str, float]
    """The corpora's shares of the training samples, not normalised."""
    directory: Path
    """Where the packed files are."""


def no_progress(what: str, done: int, total: int) -> None:
    """Reports nothing."""


def prepare(
    config: DataConfig,
    *,
    cache: Path | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress = no_progress,
) -> Dataset:
    """Reads, tokenises and packs the corpora, or opens what an earlier call packed.

    `tokenizer` replaces the recipe's (a resumed run brings its own); without it a missing one is
    trained. Safe where two processes call it at once. Raises RecipeError or MissingError where a
    corpus can't be read.
    """
    root = cache or cache_dir()
    source = _Source(config, root)
    if tokenizer is None:
        tokenizer = _tokenizer(config, root, source)
    memory = config.memory_tokens
    # what has none is what it was before there were any
    more = [memory] if memory else []
    key = fingerprint([FORMAT, source.identity, tokenizer.fingerprint, *more])

    def write(directory: Path) -> dict[str, Any]:
        return _pack(directory, tokenizer, source.documents(), progress, memory)

    def read(directory: Path, content: dict[str, Any]) -> dict[str, PackedCorpus]:
        return _open(directory, tokenizer, content)

    directory, corpora = cached(root, "datasets", key, write, read)
    weights = {name: corpus.weight for name, corpus in config.corpora.items()}
    return Dataset(corpora, tokenizer, key, weights, directory)


def read_with_tokenizer(
    config: DataConfig, *, cache: Path | None = None
) -> tuple[Tokenizer, dict[str, CorpusDocuments]]:
    """A recipe's tokenizer, from the cache or trained now, and all of its documents."""
    root = cache or cache_dir()
    source = _Source(config, root)
    return _tokenizer(config, root, source), source.documents()


def rebuild_tokenizer(config: DataConfig, *, cache: Path | None = None) -> tuple[Tokenizer, int]:
    """Trains a recipe's tokenizer now and puts it into the cache, whatever is there.

    Returns it and the number of documents that were there to read (0 where nothing is trained).
    """
    root = cache or cache_dir()
    source = _Source(config, root)
    tokenizer = _tokenizer(config, root, source, anew=True)
    trained = isinstance(config.tokenizer, SentencePieceConfig)
    return tokenizer, len(source.training_documents()) if trained else 0


def read_corpora(config: DataConfig, *, cache: Path | None = None) -> dict[str, CorpusDocuments]:
    """Every corpus, read and split. No corpus trains on what another one validates on."""
    read = {name: read_corpus(name, corpus, cache=cache) for name, corpus in config.corpora.items()}
    held = [document for documents in read.values() for document in documents.validation]
    result = {}
    for name, documents in read.items():
        drops = Drops(documents.dropped)
        train = drop_leaks(documents.train, held, drops)
        if not any(document.scored_bytes for document in train):
            raise RecipeError(
                f"data.corpora.{name}: all of its training text is in the validation of another "
                "corpus",
                hint="the corpora overlap: leave one out, or hold out by name",
            )
        result[name] = CorpusDocuments(train, documents.validation, dict(sorted(drops.items())))
    return result


class _Source:
    """The corpora's identity now, and their documents once somebody needs them."""

    def __init__(self, config: DataConfig, root: Path) -> None:
        self._config = config
        self._root = root
        self.identity = [
            [name, corpus.model_dump(mode="json", exclude={"weight"}), corpus.digest(root)]
            for name, corpus in config.corpora.items()
        ]

    @functools.cached_property
    def _documents(self) -> dict[str, CorpusDocuments]:
        return read_corpora(self._config, cache=self._root)

    def documents(self) -> dict[str, CorpusDocuments]:
        """All documents; read at the first call."""
        return self._documents

    def training_documents(self) -> list[Document]:
        """The training documents of all corpora."""
        return [document for corpus in self._documents.values() for document in corpus.train]


def _tokenizer(config: DataConfig, root: Path, source: _Source, *, anew: bool = False) -> Tokenizer:
    if not isinstance(config.tokenizer, SentencePieceConfig):
        return build_tokenizer(config.tokenizer, ())
    trainer = ["sentencepiece", version("sentencepiece"), TRAINING]
    key = fingerprint([trainer, config.tokenizer.model_dump(mode="json"), source.identity])

    def write(directory: Path) -> dict[str, Any]:
        log.info("training the tokenizer: %d tokens", config.tokenizer.vocab_size)
        build_tokenizer(config.tokenizer, source.training_documents()).save(directory)
        return {}

    def read(directory: Path, content: dict[str, Any]) -> Tokenizer:
        return load_tokenizer(directory)

    return cached(root, "tokenizers", key, write, read, anew=anew)[1]


def _pack(
    directory: Path,
    tokenizer: Tokenizer,
    corpora: dict[str, CorpusDocuments],
    progress: Progress,
    memory_tokens: int,
) -> dict[str, Any]:
    content: dict[str, Any] = {"tokenizer": tokenizer.fingerprint, "corpora": {}}
    for number, (name, documents) in enumerate(corpora.items()):
        content["corpora"][name] = entry = {"folder": str(number), "dropped": documents.dropped}
        for split, texts in (("train", documents.train), ("validation", documents.validation)):
            what = f"packing {name} ({split})"
            folder = directory / str(number) / split
            try:
                entry[split] = write_split(folder, tokenizer, texts, progress, what, memory_tokens)
            except RecipeError as error:
                hint = error.hint
                raise RecipeError(f"data.corpora.{name}: {error.message}", hint=hint) from None
    return content


def _open(
    directory: Path, tokenizer: Tokenizer, content: dict[str, Any]
) -> dict[str, PackedCorpus]:
    lengths = token_lengths(tokenizer)
    corpora = {}
    for name, entry in content["corpora"].items():
        folder = directory / entry["folder"]
        train = open_split(folder / "train", entry["train"], lengths)
        validation = open_split(folder / "validation", entry["validation"], lengths)
        corpora[name] = corpus = PackedCorpus(name, train, validation, entry["dropped"])
        log.info(
            "corpus %s: training %d documents, %d tokens; validation %d documents, %d tokens; "
            "%.3f bytes per token; %d dropped, %d truncated",
            name,
            train.counts.documents,
            train.counts.tokens,
            validation.counts.documents,
            validation.counts.tokens,
            train.counts.bytes_per_token,
            sum(corpus.dropped.values()),
            corpus.truncated,
        )
    return corpora
