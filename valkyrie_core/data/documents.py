"""Documents: what every corpus becomes, whatever it was read from.

A document is a tuple of pieces. A piece is text, or one special token that only code writes; text
from outside never becomes a special token, whatever it looks like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import xxhash

SPECIAL_TOKENS = ("<|doc|>", "<|user|>", "<|assistant|>", "<|end|>")
"""Markers that only code writes, ids 1 to 4 in this order; id 0 is `<unk>`, never produced."""
NUM_RESERVED = 1 + len(SPECIAL_TOKENS)
ROLES = {"user": "<|user|>", "assistant": "<|assistant|>"}
"""The marker that opens a turn, by role."""

Drops = Counter[str]
"""How many documents were left out, by reason."""
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""


class Piece(NamedTuple):
    """A stretch of a document; `special` is one of SPECIAL_TOKENS, then `text` is empty."""

    text: str
    scored: bool = True
    special: str | None = None
    labels: str = ""
    """As long as the text, or nothing: what training asks for after each character, instead of
    the next one; a space: nothing else."""


@dataclass(frozen=True)
class Document:
    """One text or one conversation, with a name that is unique in its corpus."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """All text, without the special tokens."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all text."""
        return sum(len(piece.text.encode()) for piece in self.pieces)

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes of the text that a model is scored on."""
        return sum(len(piece.text.encode()) for piece in self.pieces if piece.scored)

    @cached_property
    def content_hash(self) -> str:
        """The same for two documents exactly if all their pieces are the same, whatever their
        labels: with them or without, it is the same text."""
        digest = xxhash.xxh3_128()
        for text, scored, special, _ in self.pieces:
            data = text.encode()
            digest.update(f"{len(data)}:{int(scored)}:{special or ''}:".encode())
            digest.update(data)
        return digest.hexdigest()


def clean_text(text: str) -> str:
    """The text as valid Unicode: pairs of surrogates are joined, lone ones become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def text_document(name: str, text: str) -> Document:
    """A document of plain text, all of it scored."""
    return Document(name, (Piece(clean_text(text)),))


def chat_pieces(turns: Sequence[tuple[str, str]]) -> tuple[Piece, ...]:
    """The pieces of a conversation: `<|user|>text<|end|><|assistant|>answer<|end|>...`.

    `turns` holds (role, text), role "user" or "assistant". Only the text of an answer and the
    `<|end|>` after it are scored: the model learns to answer and to stop, not to ask.
    """
    pieces = []
    for role, text in turns:
        answer = role == "assistant"
        pieces.append(Piece("", False, ROLES[role]))
        pieces.append(Piece(clean_text(text), answer))
        pieces.append(Piece("", answer, "<|end|>"))
    return tuple(pieces)


def merge_turns(turns: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Joins consecutive turns of one role with a newline; empty ones are left out."""
    merged: list[tuple[str, str]] = []
    for role, text in turns:
        text = text.strip()
        if not text:
            continue
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n{text}")
        else:
            merged.append((role, text))
    return merged
