"""Validation curves of trainings, by step, and what they say at equal spending.

Shapes: P validations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from valkyrie_core.compare.statistics import Array
from valkyrie_core.train.metrics import read_metrics


class Curve(NamedTuple):
    """Bits per byte after some steps of one training."""

    steps_P: Array
    bits_P: Array


def curve_of(run: Path) -> Curve:
    """The validations of a run; empty where it logged none."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "val"]
    return Curve(
        np.array([row["step"] for row in rows], dtype=np.float64),
        np.array([row["bpb"] for row in rows], dtype=np.float64),
    )


def at_equal_spending(
    curves: Mapping[str, Sequence[Curve]], price: Mapping[str, float]
) -> dict[str, float | None]:
    """Bits per byte less the first contender's where each had spent as much as the cheapest did.

    Between two validations a curve is a straight line; None where one does not reach back so far.

    Args:
        price: of one step, by contender.
    """
    names = list(curves)
    found: dict[str, float | None] = {}
    for name in names[1:]:
        pair = (names[0], name)
        ends = [
            curve.steps_P[-1] * price[one] if len(curve.steps_P) else 0.0
            for one in pair
            for curve in curves[one]
        ]
        budget = min(ends)
        values = [_mean_at(curves[one], budget / price[one]) for one in pair]
        reference, own = values
        found[name] = None if reference is None or own is None else own - reference
    return found


def _mean_at(curves: Sequence[Curve], step: float) -> float | None:
    values = []
    for curve in curves:
        if not len(curve.steps_P) or step < curve.steps_P[0]:
            return None
        # the last validation stands for steps that rounding puts behind it
        values.append(float(np.interp(step, curve.steps_P, curve.bits_P)))
    return sum(values) / len(values) if values else None
