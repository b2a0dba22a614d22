"""Small splits in memory, as packing writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from valkyrie_core.data.byte_tokenizer import BytesTokenizer
from valkyrie_core.data.documents import Document, Piece, chat_pieces, text_document
from valkyrie_core.data.packing import PackedSplit, open_split, token_lengths, write_split

TOKENIZER = BytesTokenizer()


def pack(directory: Path, documents: Sequence[Document]) -> PackedSplit:
    """Writes and opens a split."""
    content = write_split(
        directory, TOKENIZER, list(documents), lambda what, done, total: None, "test"
    )
    return open_split(directory, content, token_lengths(TOKENIZER))


def texts(*contents: str) -> list[Document]:
    """Plain documents."""
    return [text_document(f"document {i}", content) for i, content in enumerate(contents)]


def chat(*turns: tuple[str, str]) -> Document:
    """One conversation."""
    return Document("chat", chat_pieces(turns))


__all__ = ["TOKENIZER", "Piece", "chat", "pack", "texts"]
