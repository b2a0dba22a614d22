"""The tokenizer `bytes`: one token per UTF-8 byte, after the reserved ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from valkyrie_core.config import Config
from valkyrie_core.data.documents import NUM_RESERVED, SPECIAL_TOKENS, clean_text
from valkyrie_core.data.tokenizer_files import save_tokenizer


class BytesTokenizerConfig(Config):
    """One token per UTF-8 byte, after the reserved ids: nothing to train."""

    type: Literal["bytes"] = "bytes"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return NUM_RESERVED + 256


class BytesTokenizer:
    """Token 5 + b stands for byte b."""

    kind = "bytes"
    vocab_size = NUM_RESERVED + 256
    fingerprint = hashlib.sha256(b"valkyrie bytes tokenizer 1").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, never a special one. Lone surrogates become U+FFFD."""
        return [NUM_RESERVED + byte for byte in clean_text(text).encode()]

    def special_id(self, name: str) -> int:
        """The id of one of SPECIAL_TOKENS."""
        return 1 + SPECIAL_TOKENS.index(name)

    def token_bytes(self, token: int) -> bytes:
        """The byte of a token; nothing for the reserved ids."""
        return bytes([token - NUM_RESERVED]) if token >= NUM_RESERVED else b""

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the text tokens; reserved ids give nothing."""
        return bytes(token - NUM_RESERVED for token in tokens if token >= NUM_RESERVED)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json."""
        save_tokenizer(directory, kind=self.kind, vocab_size=self.vocab_size, model=None)
