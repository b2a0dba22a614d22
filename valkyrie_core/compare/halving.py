"""Successive halving: what does not fit a budget is dropped by short trainings first.

Rung after rung the better half goes on with twice the steps (Jamieson and Talwalkar 2016, arXiv
1502.07943). The reference is in no rung: the others are set against it at the end in any case. A
rung trains with a seed that the verdict does not have, and anew rather than going on, so that every
score belongs to a whole schedule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from valkyrie_core.errors import UsageError

FACTORS = (2, 4, 8)
"""A rung has so many times the steps of the one before, the last one that part of all steps: the
first factor that fits."""
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


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
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds > 0:
        raise UsageError(f"{text!r} is no span of time", hint="write 20m, 1h30m or 90s")
    return seconds


def rungs(seconds: Mapping[str, float], seeds: int, budget: float) -> list[Rung]:
    """The rounds that leave as many designs as fit; none where all do.

    Args:
        seconds: of one whole training, by design, the reference first.
        seeds: trainings of each design that is left.
        budget: seconds of all trainings together.

    Raises UsageError where the reference and one other design don't fit.
    """
    reference, *others = seconds.values()
    others = sorted(others, reverse=True)
    if seeds * (reference + sum(others)) <= budget:
        return []
    # the dearest ones may be the best ones
    for left in range(len(others) - 1, 0, -1):
        whole = seeds * (reference + sum(others[:left]))
        for factor in FACTORS:
            found = _rounds(len(others), left, factor)
            if whole + _cost(found, others) <= budget:
                return found
    least = seeds * (reference + others[0])
    if len(others) > 1:
        least += _cost(_rounds(len(others), 1, FACTORS[-1]), others)
    raise UsageError(
        f"{_minutes(budget)} are too few: {seeds} trainings of the reference and of one other "
        f"design take {_minutes(least)}"
        + (", the rounds before them included" if others[1:] else ""),
        hint=f"--budget {_minutes(least)}, or fewer --seeds or --steps",
    )


def _rounds(designs: int, left: int, factor: int) -> list[Rung]:
    """From so many designs to those that are left, half of them a round."""
    keeps = []
    while designs > left:
        designs = max(left, -(-designs // 2))
        keeps.append(designs)
    return [Rung(factor ** (place - len(keeps)), keep) for place, keep in enumerate(keeps)]


def _cost(found: Sequence[Rung], others: Sequence[float]) -> float:
    """Seconds of the rounds, if the dearest designs always go on."""
    counts = [len(others), *(rung.keep for rung in found)]
    return sum(rung.share * sum(others[:count]) for rung, count in zip(found, counts, strict=False))


def _minutes(seconds: float) -> str:
    """Rounded up, as `--budget` takes it."""
    if seconds < 60:
        return f"{-(-seconds // 1):.0f}s"
    return f"{-(-seconds // 60):.0f}m"
