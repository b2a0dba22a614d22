from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from valkyrie_core.infer.text import Utf8Stream

texts = st.one_of(st.text().map(lambda text: text.encode()), st.binary())


@given(data=texts, cuts=st.lists(st.integers(0, 60)))
def test_chunks_join_to_the_whole_decoding(data: bytes, cuts: list[int]) -> None:
    stream = Utf8Stream()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [stream.feed(data[a:b]) for a, b in pairwise(bounds)]
    assert "".join(pieces) + stream.finish() == data.decode("utf-8", errors="replace")


@given(text=st.text())
def test_valid_text_a_byte_at_a_time_has_no_half_characters(text: str) -> None:
    stream = Utf8Stream()
    pieces = [stream.feed(bytes([byte])) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.finish() == ""


def test_a_cut_character_shows_at_the_end() -> None:
    stream = Utf8Stream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_invalid_bytes_show_at_once() -> None:
    stream = Utf8Stream()
    assert stream.feed(b"a\xff") == "a\ufffd"
    assert stream.feed(b"\xe2\x82") == ""
    assert stream.feed(b"b") == "\ufffdb"
