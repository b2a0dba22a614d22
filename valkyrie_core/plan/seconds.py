"""How long a training step and a decoded token take on a machine whose rates are known.

A step is a row of operations, and each waits for whichever takes longer: its arithmetic or its
memory (the roofline model, Williams et al. 2009, doi 10.1145/1498765.1498785); besides, each has to
be started. Every rate is the best that was measured or published, and what operations leave in the
caches of the processor is not known: an estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from valkyrie_core.plan.trace import Work


class Rates(NamedTuple):
    """What bounds an operation."""

    flops_per_second: float
    """In matrix products."""
    bytes_per_second: float
    """Of main memory, read and written together."""
    start_seconds: float
    """Before an operation computes anything."""


def step_seconds(work: Iterable[Work], rates: Rates) -> float:
    """One operation after the other, each at the rate that bounds it."""
    return sum(
        rates.start_seconds
        + max(one.flops / rates.flops_per_second, one.moved / rates.bytes_per_second)
        for one in work
    )


def least_seconds(flops: float, rates: Rates) -> float:
    """Nothing but the arithmetic, all of it at the peak: no machine is faster."""
    return flops / rates.flops_per_second
