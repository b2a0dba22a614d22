from __future__ import annotations

import pytest

from valkyrie_core.data.documents import (
    Document,
    Piece,
    chat_pieces,
    clean_text,
    merge_turns,
    text_document,
)


def test_only_answers_and_their_ends_are_scored() -> None:
    pieces = chat_pieces([("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")])
    assert pieces == (
        Piece("", False, "<|user|>"),
        Piece("Hi", False),
        Piece("", False, "<|end|>"),
        Piece("", False, "<|assistant|>"),
        Piece("Hello", True),
        Piece("", True, "<|end|>"),
        Piece("", False, "<|user|>"),
        Piece("Bye", False),
        Piece("", False, "<|end|>"),
    )
    document = Document("chat", pieces)
    assert document.text == "HiHelloBye"
    assert (document.num_bytes, document.scored_bytes) == (10, 5)


def test_bytes_are_counted_not_characters() -> None:
    assert text_document("a", "é\U0001f600").num_bytes == 6


def test_content_hash_tells_pieces_apart() -> None:
    def digest(*pieces: Piece) -> str:
        return Document("any name", pieces).content_hash

    hashes = [
        digest(Piece("ab")),
        digest(Piece("a"), Piece("b")),
        digest(Piece("ab", False)),
        digest(Piece("ab"), Piece("", True, "<|end|>")),
        digest(Piece("<|end|>")),
        digest(Piece("", True, "<|end|>")),
    ]
    assert len(set(hashes)) == len(hashes)
    assert Document("x", (Piece("ab"),)).content_hash == hashes[0]
    # the same text, whatever is asked about it: what is held out is not trained on with labels
    assert digest(Piece("ab", labels="1 ")) == digest(Piece("ab"))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain", "plain"),
        ("a\ud800b", "a\ufffdb"),
        ("\udfff", "\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
    ],
)
def test_surrogates_are_joined_or_replaced(text: str, clean: str) -> None:
    assert clean_text(text) == clean


def test_turns_of_one_speaker_are_one_turn() -> None:
    turns = [("user", " a "), ("user", "b"), ("assistant", " "), ("user", "c"), ("assistant", "d")]
    assert merge_turns(turns) == [("user", "a\nb\nc"), ("assistant", "d")]
