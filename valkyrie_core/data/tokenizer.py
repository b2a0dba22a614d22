"""Tokenizers: plain bytes, or SentencePiece BPE with byte fallback.

A new type is a file with a config class and a class that follows the protocol below, one line in
the union and one in each of `build_tokenizer` and `load_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

from pydantic import Discriminator

from valkyrie_core.data.bpe_tokenizer import (
    BPETokenizer,
    SentencePieceConfig,
    TokenizerFileConfig,
    load_bpe_file,
    train_bpe,
)
from valkyrie_core.data.byte_tokenizer import BytesTokenizer, BytesTokenizerConfig
from valkyrie_core.data.documents import NUM_RESERVED, SPECIAL_TOKENS, Document, Piece
from valkyrie_core.data.tokenizer_files import read_tokenizer
from valkyrie_core.errors import CheckpointError, RecipeError

__all__ = [
    "EMPTY",
    "NUM_RESERVED",
    "SPECIAL_TOKENS",
    "BytesTokenizerConfig",
    "SentencePieceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerFileConfig",
    "build_tokenizer",
    "encode_pieces",
    "load_tokenizer",
    "opening",
]

TokenizerConfig = Annotated[
    BytesTokenizerConfig | SentencePieceConfig | TokenizerFileConfig, Discriminator("type")
]


class Tokenizer(Protocol):
    """Text to ids and back, exactly, for every text that is valid Unicode."""

    kind: str
    vocab_size: int
    fingerprint: str
    """sha256 of what the tokenizer is; checkpoints are bound to it."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, never a special one. Lone surrogates become U+FFFD."""
        ...

    def special_id(self, name: str) -> int:
        """The id of one of SPECIAL_TOKENS."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; nothing for the reserved ids."""
        ...

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the text tokens; reserved ids give nothing."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files; `load_tokenizer` reads them."""
        ...


def build_tokenizer(config: TokenizerConfig, documents: Iterable[Document]) -> Tokenizer:
    """The tokenizer that a recipe names; only `sentencepiece` reads the documents."""
    match config:
        case BytesTokenizerConfig():
            return BytesTokenizer()
        case TokenizerFileConfig():
            return load_bpe_file(config)
        case SentencePieceConfig():
            return train_bpe(config, documents)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Reads what `save` wrote.

    Raises MissingError where there is none, CheckpointError where a file is damaged.
    """
    kind, model = read_tokenizer(directory)
    if kind == BytesTokenizer.kind:
        return BytesTokenizer()
    if kind == BPETokenizer.kind and model is not None:
        return BPETokenizer(model, source=str(directory / "tokenizer.model"))
    raise CheckpointError(f"{directory} holds a tokenizer of an unknown kind, {kind!r}")


NO_LABEL = -100
"""Of a token after which the next one is asked for, as everywhere."""
EMPTY = 0
"""The token of a place without text; no tokenizer makes it."""


def opening(tokenizer: Tokenizer, memory_tokens: int) -> list[int]:
    """What stands before a document: its marker, and room that a looped model writes into."""
    return [tokenizer.special_id("<|doc|>"), *[EMPTY] * memory_tokens]


class Encoded(NamedTuple):
    """A document's tokens."""

    tokens: list[int]
    scored: list[bool]
    """Whether a model is scored on it."""
    labels: list[int] | None
    """What training asks for after it, -100: the next token; None: nowhere anything else."""


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Encoded:
    """The ids of a document's pieces, and what is known of each."""
    tokens: list[int] = []
    scored: list[bool] = []
    labels: list[int] = []
    for piece in pieces:
        if piece.special is not None:
            ids = [tokenizer.special_id(piece.special)]
        else:
            ids = tokenizer.encode(piece.text)
        tokens += ids
        scored += [piece.scored] * len(ids)
        labels += _labels(tokenizer, piece, ids) if piece.labels else [NO_LABEL] * len(ids)
    has_labels = any(label != NO_LABEL for label in labels)
    return Encoded(tokens, scored, labels if has_labels else None)


def _labels(tokenizer: Tokenizer, piece: Piece, ids: list[int]) -> list[int]:
    """A token's label is that of its last character.

    Raises RecipeError where a label is no single token.
    """
    by_byte: list[str] = []
    for character, label in zip(piece.text, piece.labels, strict=True):
        # what ends within a character says nothing yet
        by_byte += [" "] * (len(character.encode()) - 1) + [label]
    found, end = [], 0
    for token in ids:
        end += len(tokenizer.token_bytes(token))
        label = by_byte[end - 1]
        own = [NO_LABEL] if label == " " else tokenizer.encode(label)
        if len(own) != 1:
            raise RecipeError(
                f"the label {label!r} is no single token", hint="data.tokenizer: {type: bytes}"
            )
        found += own
    return found
