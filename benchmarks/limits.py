"""What the processor can do at most, so that a table can say how far from it we are."""

from __future__ import annotations

import time

import torch

from valkyrie_core.machine.hardware import Precision, measure_matmul

READ_BYTES = 1 << 30
"""More than any cache holds."""
READINGS = 8


def of_matmul_peak(flops_per_second: float, precision: Precision) -> str:
    """A rate of arithmetic beside that of the best square matrix product."""
    peak = measure_matmul(precision).flops_per_second
    return (
        f"{flops_per_second / 1e9:,.0f} GFLOP/s, {flops_per_second / peak:.0%} of what the best "
        f"{precision} matrix product reaches here ({peak / 1e9:,.0f})"
    )


def read_bytes_per_second() -> float:
    """How fast all threads together read memory: the best of some sums over a large buffer."""
    buffer = torch.ones(READ_BYTES // 4)
    seconds = []
    for _ in range(READINGS):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / min(seconds)
