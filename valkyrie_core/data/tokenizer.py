"""Tokenizers: plain bytes, or SentencePiece BPE with byte fallback.

A new type is a file with a config class and a class that follows the protocol below, one line in
the union and one in each of `build_tokenizer` and `load_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Protocol

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
from valkyrie_core.errors import CheckpointError

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


EMPTY = 0
"""The token of a place without text; no tokenizer makes it."""


def opening(tokenizer: Tokenizer, memory_tokens: int) -> list[int]:
    """What stands before a document: its marker, and room that a looped model writes into."""
    return [tokenizer.special_id("<|doc|>"), *[EMPTY] * memory_tokens]


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> tuple[list[int], list[bool]]:
    """The ids of a document's pieces, and for each whether a model is scored on it."""
    tokens: list[int] = []
    scored: list[bool] = []
    for piece in pieces:
        if piece.special is not None:
            ids = [tokenizer.special_id(piece.special)]
        else:
            ids = tokenizer.encode(piece.text)
        tokens += ids
        scored += [piece.scored] * len(ids)
    return tokens, scored
