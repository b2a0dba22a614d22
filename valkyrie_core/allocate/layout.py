"""Which layers are recurrent and which attention: what is asked for, as a list of letters or names.

R is a recurrent block, A an attention block, whatever the recipe's blocks are called; anything else
is the name of a block of the recipe.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from valkyrie_core.errors import UsageError

RECURRENT, ATTENTION = "R", "A"
PRESETS = {"alternate": "R A", "3:1": "3:1", "5:1": "5:1", "7:1": "7:1"}
"""alternate: even layers RWKV, odd layers attention, the original default."""
_RATIO = re.compile(r"(\d{1,6}):(\d{1,6})")
_REPEAT = re.compile(r"x(\d{1,6})")
_LETTERS = re.compile(r"[RA]+")
MAX_LAYERS = 10_000


class Layout(NamedTuple):
    """What every layer is, first layer first."""

    layers: tuple[str, ...]
    asked: str
    """What was asked for, in words."""
    notes: tuple[str, ...] = ()
    """What was decided where the question left something open."""


def from_ratio(text: str, num_layers: int) -> Layout:
    """`3:1` is three recurrent layers to one of attention, the attention spread evenly.

    Each attention layer ends a group, so that the first layer is recurrent wherever one is: what
    comes first sees only single tokens, and reading order costs a recurrent layer nothing there.
    Raises UsageError where the text is no ratio.
    """
    match = _RATIO.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no ratio", hint="recurrent:attention, such as --ratio 3:1")
    recurrent, attention = int(match[1]), int(match[2])
    if recurrent + attention == 0:
        raise UsageError("0:0 is no ratio: one of the two kinds must be there")
    exact = num_layers * attention / (recurrent + attention)
    count = round(exact)
    if num_layers > 1:
        # a kind that is asked for is there
        count = min(max(count, min(attention, 1)), num_layers - min(recurrent, 1))
    notes = []
    if count != exact:
        notes.append(
            f"{num_layers} layers do not divide as {recurrent}:{attention}: "
            f"{num_layers - count} recurrent and {count} attention are the nearest"
        )
    if 0 < count < num_layers:
        notes.append("attention is spread evenly, each at the end of its group; layer 0 has none")
    return Layout(spread(num_layers, count), f"ratio {recurrent}:{attention}", tuple(notes))


def from_pattern(text: str, num_layers: int, names: tuple[str, ...]) -> Layout:
    """`R R R A`, `R x3 A`, `RRRA` or names of blocks; shorter ones are laid again.

    `xN` repeats all that stands before it, back to the last `xN`. Raises UsageError where a word is
    neither, or the pattern does not fit the number of layers.
    """
    layers: list[str] = []
    group = 0
    for word in text.split():
        repeat = _REPEAT.fullmatch(word)
        if _LETTERS.fullmatch(word):
            layers += word
        elif word in names:
            layers.append(word)
        elif repeat is not None:
            if group == len(layers):
                raise UsageError(f"{word} repeats nothing: it stands behind what it repeats")
            times = int(repeat[1])
            if not 1 <= times * (len(layers) - group) <= MAX_LAYERS:
                raise UsageError(f"{word} makes {times * (len(layers) - group)} layers")
            layers += layers[group:] * (times - 1)
            group = len(layers)
        else:
            raise UsageError(
                f"{word!r} is no layer",
                hint=f"R (recurrent), A (attention), xN, or a block: {', '.join(names)}",
            )
    if not layers:
        raise UsageError("the pattern is empty", hint='such as --pattern "R R R A"')
    if num_layers % len(layers):
        raise UsageError(
            f"a pattern of {len(layers)} layers does not make the {num_layers} of the recipe"
        )
    return Layout(tuple(layers) * (num_layers // len(layers)), f"pattern {' '.join(text.split())}")


def from_preset(name: str, num_layers: int) -> Layout:
    """One of PRESETS. Raises UsageError where there is none of that name."""
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}", hint=f"there are {', '.join(PRESETS)}")
    if name != "alternate":
        return from_ratio(name, num_layers)
    layers = tuple((RECURRENT, ATTENTION)[layer % 2] for layer in range(num_layers))
    return Layout(layers, "preset alternate", ("even layers are recurrent, odd ones attention",))


def spread(num_layers: int, attention: int) -> tuple[str, ...]:
    """So many attention layers, evenly: the last of each of as many groups."""
    ends = {-(-(group + 1) * num_layers // attention) - 1 for group in range(attention)}
    return tuple(ATTENTION if layer in ends else RECURRENT for layer in range(num_layers))


def brief(layers: tuple[str, ...]) -> str:
    """A pattern as it is written: `R R R A x8`."""
    for length in range(1, len(layers) + 1):
        times = len(layers) // length
        if len(layers) % length == 0 and layers == layers[:length] * times:
            return " ".join(layers[:length]) + (f" x{times}" if times > 1 else "")
    return ""
