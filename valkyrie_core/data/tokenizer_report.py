"""What a tokenizer does to text and what it costs: the numbers of `valkyrie tokenizer`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from valkyrie_core.data.dataset import DataConfig, read_with_tokenizer, rebuild_tokenizer
from valkyrie_core.data.documents import NUM_RESERVED, Document
from valkyrie_core.data.tokenizer import Tokenizer

HOSTILE_TEXTS = {
    "empty": "",
    "nul": "a\x00b\x00",
    "control characters": "".join(map(chr, range(0x20)))
    + "\x7f"
    + "".join(map(chr, range(0x80, 0xA0))),
    "escape sequences": "\x1b[31mred\x1b[0m \x1b]52;c;aGk=\x07",
    "line ends": "a\r\nb\rc\n\n\nd\u2028e\u2029f\x0b\x0c\x85",
    "spaces": "  two  three   \t tab\u00a0nbsp\u3000wide\u200bzero trailing  ",
    "only spaces": " " * 1000,
    "word boundary mark": "\u2581a\u2581\u2581b \u2581 \u2581",
    "special tokens as text": "<|doc|><|user|>hi<|end|><|assistant|><|doc|> <unk> <s> </s>",
    "byte tokens as text": "<0x00><0x41><0xFF> <0xE2><0x96><0x81>",
    "byte order mark": "\ufeffafter\ufeff",
    "emoji": "\U0001f469\u200d\U0001f680 \U0001f1f3\U0001f1f4 \u2764\ufe0f \U0001f44b\U0001f3fd",
    "combining": "e\u0301 \u0041\u030a Z\u0351\u036b\u0343\u036a",
    "not normalised": "\ufb01 \u2460 \u00bd \uff21 \u1e9e \u212b \u0130 \uac00 \u1100\u1161",
    "right to left": "\u202eabc\u202c \u0627\u0644\u0639 \u2067x\u2069 \u05d0\u05d1",
    "every plane": "\u0800\uffff\ufffe\ufffd\U00010000\U0001ffff\U000e0001\U0010ffff",
    "scripts": "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d \u0395\u03bb",
    "digits": "3.14159 1e-4 0x7f \u0663\u0664 \u00b2 12345678901234567890",
    "long word": "x" * 100_000,
    "long line": "word and another " * 20_000,
}
"""Texts that tokenizers get wrong, by what is odd about them."""


@dataclass(frozen=True)
class TokenizerBuild:
    """A tokenizer that was built."""

    tokenizer: Tokenizer
    directory: Path
    """Where it was written."""
    documents: int
    """Training documents that were there to read; 0 where nothing is trained."""
    seconds: float


@dataclass(frozen=True)
class SplitScore:
    """How a tokenizer does on the documents of one split."""

    documents: int
    bytes: int
    tokens: int
    round_trips: int
    """Documents that come back exactly."""

    @property
    def bytes_per_token(self) -> float | None:
        """How much text one token stands for; None where there are no tokens."""
        return self.bytes / self.tokens if self.tokens else None

    def __add__(self, other: SplitScore) -> SplitScore:
        return SplitScore(
            self.documents + other.documents,
            self.bytes + other.bytes,
            self.tokens + other.tokens,
            self.round_trips + other.round_trips,
        )


@dataclass(frozen=True)
class CorpusScore:
    """How a tokenizer does on one corpus."""

    train: SplitScore
    validation: SplitScore

    @property
    def together(self) -> SplitScore:
        """Both splits."""
        return self.train + self.validation


@dataclass(frozen=True)
class TokenizerEvaluation:
    """What a tokenizer does to every document of a recipe and to hostile texts."""

    tokenizer: Tokenizer
    corpora: dict[str, CorpusScore]
    hostile: dict[str, bool]
    """Whether each hostile text comes back exactly, without a special token."""

    @property
    def exact(self) -> bool:
        """Everything came back exactly."""
        splits = [score.together for score in self.corpora.values()]
        return all(self.hostile.values()) and all(s.round_trips == s.documents for s in splits)


def build(config: DataConfig, directory: Path, *, cache: Path | None = None) -> TokenizerBuild:
    """Trains the recipe's tokenizer, for the cache and for `directory`."""
    started = time.monotonic()
    tokenizer, documents = rebuild_tokenizer(config, cache=cache)
    tokenizer.save(directory)
    return TokenizerBuild(tokenizer, directory, documents, time.monotonic() - started)


def evaluate(config: DataConfig, *, cache: Path | None = None) -> TokenizerEvaluation:
    """Encodes and decodes every document of the recipe's corpora, and the hostile texts."""
    tokenizer, documents = read_with_tokenizer(config, cache=cache)
    corpora = {
        name: CorpusScore(
            score_documents(tokenizer, corpus.train), score_documents(tokenizer, corpus.validation)
        )
        for name, corpus in documents.items()
    }
    hostile = {name: comes_back(tokenizer, text) for name, text in HOSTILE_TEXTS.items()}
    return TokenizerEvaluation(tokenizer, corpora, hostile)


def score_documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> SplitScore:
    """Counts over documents: each text piece is encoded and decoded by itself."""
    score = SplitScore(0, 0, 0, 0)
    for document in documents:
        tokens, exact = 0, True
        for piece in document.pieces:
            ids = tokenizer.encode(piece.text)
            tokens += len(ids) + (piece.special is not None)
            exact = exact and tokenizer.decode_bytes(ids) == piece.text.encode()
        score += SplitScore(1, document.num_bytes, tokens, int(exact))
    return score


def comes_back(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text is the same after encoding and decoding, and gives no reserved id."""
    ids = tokenizer.encode(text)
    return tokenizer.decode(ids) == text and all(token >= NUM_RESERVED for token in ids)


def embedding_parameters(vocab_size: int, dim: int, head: Literal["linear", "tied"]) -> int:
    """Parameters of the embedding and the output matrix; a tied head shares the embedding's."""
    return vocab_size * dim * (1 if head == "tied" else 2)
