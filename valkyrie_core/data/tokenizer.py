"""Tokenizers: plain bytes, or SentencePiece BPE with byte fallback."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field

from valkyrie_core.config import Config

SPECIAL_TOKENS = ("<|doc|>", "<|user|>", "<|assistant|>", "<|end|>")
"""Markers that only code writes, ids 1 to 4 in this order; id 0 is `<unk>`, never produced."""
NUM_RESERVED = 1 + len(SPECIAL_TOKENS)


class BytesTokenizerConfig(Config):
    """One token per UTF-8 byte, after the reserved ids: nothing to train."""

    type: Literal["bytes"] = "bytes"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return NUM_RESERVED + 256


class SentencePieceConfig(Config):
    """SentencePiece byte-pair encoding with byte fallback, trained on the recipe's corpora."""

    type: Literal["sentencepiece"] = "sentencepiece"
    vocab_size: int = Field(default=1024, ge=NUM_RESERVED + 256, le=262_144)
    """Number of token ids, with the reserved ones and the 256 bytes."""
    max_training_bytes: int = Field(default=20_000_000, ge=10_000)
    """At most this much text is read to train the tokenizer."""


class TokenizerFileConfig(Config):
    """A SentencePiece model that exists: one built by `valkyrie tokenizer build`."""

    type: Literal["file"] = "file"
    path: str = Field(min_length=1)
    """The `.model` file."""
    vocab_size: int = Field(ge=NUM_RESERVED + 256, le=262_144)
    """Number of token ids; a file that disagrees is refused."""


TokenizerConfig = Annotated[
    BytesTokenizerConfig | SentencePieceConfig | TokenizerFileConfig, Discriminator("type")
]
