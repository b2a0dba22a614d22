"""Times peers side by side: round-robin in one process, medians of repeats, ratios by round.

A machine's speed drifts by a tenth or two from minute to minute, so the time of one thing here and
of another thing later says little. Here every round runs every peer once, and a ratio is the median
over the rounds of what one peer took divided by what another took in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Call = Callable[[], object]
Announce = Callable[[str], None]
"""Told what is being done, in a few words."""

SAMPLE_SECONDS = 0.05
"""A sample is so many calls that it takes at least this long."""


class Spread(NamedTuple):
    """The middle of some numbers, and between what most of them lie."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The median and the 10 and 90 percent points."""
        return cls(statistics.median(values), _quantile(values, 0.1), _quantile(values, 0.9))


class Timing(NamedTuple):
    """What one peer took."""

    seconds: tuple[float, ...]
    """Per round, of one call."""
    first_seconds: float
    """Of the very first call: building, compiling, touching memory."""

    @property
    def spread(self) -> Spread:
        """Of the seconds of a call."""
        return Spread.of(self.seconds)

    def rate(self, work: float) -> Spread:
        """Units of work per second, where a call does `work` of them."""
        return Spread.of([work / seconds for seconds in self.seconds])

    def times_faster_than(self, other: Timing) -> Spread:
        """How many times longer `other` took, round by round.

        Raises:
            ValueError: they were not measured in the same rounds.
        """
        if len(self.seconds) != len(other.seconds):
            raise ValueError("a ratio needs two peers of the same rounds")
        pairs = zip(self.seconds, other.seconds, strict=True)
        return Spread.of([theirs / ours for ours, theirs in pairs])


def side_by_side(
    peers: Mapping[str, Call],
    *,
    repeats: int,
    announce: Announce,
    warm_up: int = 2,
    sample_seconds: float = SAMPLE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Seconds per call of every peer.

    Args:
        peers: what to call, by name.
        repeats: rounds; every round takes one sample of every peer, every other round backwards,
            so that no peer always comes after the same one.
        announce: told about every step.
        warm_up: calls before the first sample, the first of which is reported by itself.
        sample_seconds: see `SAMPLE_SECONDS`.
        clock: seconds.

    Raises:
        ValueError: no round, or no warm-up.
    """
    if repeats < 1 or warm_up < 1:
        raise ValueError("at least one repeat and one call to warm up")
    first: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, call in peers.items():
        announce(f"{name}: first call")
        first[name] = last = _seconds(call, 1, clock)
        for _ in range(warm_up - 1):
            last = _seconds(call, 1, clock)
        calls[name] = max(1, round(sample_seconds / max(last, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in peers}
    names = list(peers)
    for index in range(repeats):
        for name in names if index % 2 == 0 else reversed(names):
            announce(f"{name}: round {index + 1} of {repeats}")
            samples[name].append(_seconds(peers[name], calls[name], clock))
    return {name: Timing(tuple(samples[name]), first[name]) for name in peers}


def best(timings: Mapping[str, Timing]) -> tuple[str, Timing]:
    """The peer with the smallest median."""
    return min(timings.items(), key=lambda item: item[1].spread.median)


def _seconds(call: Call, calls: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(calls):
        call()
    return (clock() - began) / calls


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest values, as numpy's."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
