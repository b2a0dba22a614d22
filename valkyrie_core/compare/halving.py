"""Successive halving: what does not fit a budget is dropped by short trainings first.

Rung after rung the better half, or as many as fit, go on with twice the steps (Jamieson and
Talwalkar 2016, arXiv 1502.07943). The reference is in no rung: the others are set against it at the
end in any case. A rung trains with a seed that the verdict does not have, and anew rather than
going on, so that every score belongs to a whole schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from valkyrie_core.errors import UsageError

FACTORS = (2, 4, 8)
"""A rung has so many times the steps of the one before, the last one that part of all steps: the
first factor that fits."""
LEAST_STEPS = 10
"""Of the shortest training of a rung: fewer tell nothing."""
_NUMBER = r"([0-9]{1,9}(?:\.[0-9]+)?)"
_DURATION = re.compile(f"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?|{_NUMBER}")


class Rung(NamedTuple):
    """One round of short trainings."""

    share: float
    """Of each design's steps."""
    keep: int
    """How many go on."""


def seconds_of(text: str) -> float:
    """Seconds of "20m", "1h30m", "90s" or "90". Raises UsageError for anything else."""
    found = _DURATION.fullmatch(text.strip())
    parts = [float(part or 0) for part in found.groups()] if found else []
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1, 1), strict=False))
    if not seconds > 0:
        raise UsageError(f"{text!r} is no span of time", hint="write 20m, 1h30m or 90s")
    return seconds


def rungs(
    seconds: Mapping[str, float], seeds: int, budget: float, steps: int = 1_000_000
) -> list[Rung]:
    """The rounds that leave as many designs as fit; none where all do.

    Args:
        seconds: of one whole training, by design, the reference first.
        seeds: trainings of each design that is left.
        budget: seconds of all trainings together.
        steps: of the shortest whole training.

    Raises UsageError where the reference and one other design don't fit.
    """
    reference, *others = seconds.values()
    others = sorted(others, reverse=True)
    if seeds * (reference + sum(others)) <= budget:
        return []
    least_share = min(1.0, LEAST_STEPS / steps)
    # the dearest ones may be the best ones
    for left in range(len(others) - 1, 0, -1):
        whole = seeds * (reference + sum(others[:left]))
        for factor in FACTORS:
            found = _rounds(len(others), left, factor, least_share)
            if whole + _cost(found, others) <= budget:
                return found
    least = seeds * (reference + others[0])
    if len(others) > 1:
        least += _cost(_rounds(len(others), 1, FACTORS[-1], least_share), others)
    raise UsageError(
        f"a budget of {_told(budget)} is too little: {seeds} trainings of the reference and of one "
        f"other design take {_told(least)}"
        + (", the rounds before them included" if others[1:] else ""),
        hint=f"--budget {_told(least)}, or fewer --seeds or --steps",
    )


def _rounds(designs: int, left: int, factor: int, least_share: float) -> list[Rung]:
    """From so many designs to those that are left, half of them a round; rounds that would be too
    short are one that is as long as has to be."""
    keeps = []
    while designs > left:
        designs = max(left, -(-designs // 2))
        keeps.append(designs)
    shares = [factor ** (place - len(keeps)) for place in range(len(keeps))]
    long_enough = {max(share, least_share): keep for share, keep in zip(shares, keeps, strict=True)}
    return [Rung(share, keep) for share, keep in long_enough.items()]


def _cost(found: Sequence[Rung], others: Sequence[float]) -> float:
    """Seconds of the rounds, if the dearest designs always go on."""
    counts = [len(others), *(rung.keep for rung in found)]
    return sum(rung.share * sum(others[:count]) for rung, count in zip(found, counts, strict=False))


def _told(seconds: float) -> str:
    """Rounded up, as `--budget` takes it."""
    if seconds < 60:
        return f"{math.ceil(1000 * seconds) / 1000:g}s"
    return f"{math.ceil(seconds / 60):.0f}m"
