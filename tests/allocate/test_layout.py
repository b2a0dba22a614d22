"""Ratios, patterns and presets as they are typed."""

from __future__ import annotations

import itertools

import pytest

from valkyrie_core.allocate.layout import brief, from_pattern, from_preset, from_ratio, spread
from valkyrie_core.errors import UsageError

NAMES = ("rwkv", "attn")


@pytest.mark.parametrize(
    ("ratio", "num_layers", "expected"),
    [
        ("3:1", 4, "RRRA"),
        ("3:1", 8, "RRRARRRA"),
        ("1:1", 4, "RARA"),
        ("1:3", 4, "RAAA"),
        ("0:4", 4, "AAAA"),
        ("4:0", 4, "RRRR"),
        ("0:1", 1, "A"),
        # a kind that is asked for is there
        ("7:1", 4, "RRRA"),
        ("1:7", 4, "RAAA"),
        ("5:1", 7, "RRRRRRA"),
    ],
)
def test_ratios(ratio: str, num_layers: int, expected: str) -> None:
    assert "".join(from_ratio(ratio, num_layers).layers) == expected


def test_what_does_not_divide_is_said() -> None:
    assert "nearest" in from_ratio("7:1", 4).notes[0]
    assert not any("nearest" in note for note in from_ratio("3:1", 8).notes)


@pytest.mark.parametrize("num_layers", range(2, 40))
def test_attention_is_even_and_never_first(num_layers: int) -> None:
    for count in range(1, num_layers):
        layers = spread(num_layers, count)
        assert layers.count("A") == count
        assert layers[0] == "R"
        ends = [-1, *(i for i, kind in enumerate(layers) if kind == "A")]
        groups = {b - a for a, b in itertools.pairwise(ends)}
        assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize(
    ("pattern", "num_layers", "expected"),
    [
        ("R R R A", 8, "R R R A R R R A"),
        ("R R R A x2", 8, "R R R A R R R A"),
        ("R x3 A", 4, "R R R A"),
        ("R x3 A x2", 5, "R R R A A"),
        ("RRRA", 4, "R R R A"),
        ("rwkv attn", 4, "rwkv attn rwkv attn"),
        ("A rwkv", 2, "A rwkv"),
    ],
)
def test_patterns(pattern: str, num_layers: int, expected: str) -> None:
    assert from_pattern(pattern, num_layers, NAMES).layers == tuple(expected.split())


def test_alternate_is_the_original_default() -> None:
    assert from_preset("alternate", 5).layers == ("R", "A", "R", "A", "R")


@pytest.mark.parametrize("text", ["", "3", "3:", ":", "0:0", "-1:2", "a:b", "3:1:1", "1.5:1"])
def test_no_ratio(text: str) -> None:
    with pytest.raises(UsageError):
        from_ratio(text, 4)


@pytest.mark.parametrize(
    "text", ["", "  ", "Q", "r", "R R A", "x2", "R x2 x2", "R x0", "R x999999", "R,A"]
)
def test_no_pattern(text: str) -> None:
    with pytest.raises(UsageError):
        from_pattern(text, 4, NAMES)


def test_no_preset() -> None:
    with pytest.raises(UsageError, match="9:1"):
        from_preset("9:1", 4)


def test_brief_reads_back() -> None:
    for text in ("R R R A x8", "R A x2", "R", "R A A", "A x4"):
        layers = from_pattern(text, len(from_pattern_length(text)), NAMES).layers
        assert brief(layers) == text


def from_pattern_length(text: str) -> tuple[str, ...]:
    words, _, times = text.partition(" x")
    return tuple(words.split()) * int(times or 1)
