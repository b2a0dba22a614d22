"""Attention with positions and windows, one query at a time, in numpy and from the papers alone.

Shapes: T time, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def yarn_frequency(pair: int, head_dim: int, theta: float, factor: float, trained: int) -> float:
    """arXiv 2309.00071, section 3.2: by how often a pair turns in the trained length."""
    frequency = theta ** (-2 * pair / head_dim)
    wavelength = 2 * math.pi / frequency
    ratio = trained / wavelength
    if ratio < 1:
        gamma = 0.0
    elif ratio > 32:
        gamma = 1.0
    else:
        gamma = (ratio - 1) / (32 - 1)
    return (1 - gamma) * frequency / factor + gamma * frequency


def yarn_temperature(factor: float) -> float:
    """What scores are multiplied by: 1 / t, where sqrt(1 / t) = 0.1 ln(factor) + 1."""
    root = 0.1 * math.log(factor) + 1
    return root * root


def alibi_slope(head: int, heads: int) -> float:
    """arXiv 2108.12409 for a power of two; `head` counts from 0."""
    ratio = 2 ** (-8 / heads)
    return float(ratio ** (head + 1))


def turned(x_H: Array, position: float, frequency: Callable[[int], float]) -> Array:
    """Pairs (i, i + H / 2) as complex numbers, turned."""
    half = len(x_H) // 2
    z = x_H[:half] + 1j * x_H[half:]
    z = z * np.exp(1j * position * np.array([frequency(i) for i in range(half)]))
    return np.concatenate([z.real, z.imag])


def attention(
    q_TH: Array,
    k_TH: Array,
    v_TH: Array,
    *,
    frequency: Callable[[int], float] | None = None,
    temperature: float = 1.0,
    slope: float = 0.0,
    window: int | None = None,
    sinks: int = 0,
) -> Array:
    """One head over one document. With a window, cached tokens are numbered without gaps.

    That is StreamingLLM's rule (arXiv 2309.17453, section 3.2): the sinks that are kept and the
    window after them take positions 0, 1, 2 ... of the cache, not those of the text.
    """
    T, H = q_TH.shape
    y_TH = np.zeros_like(v_TH)
    for t in range(T):
        kept = list(range(t + 1))
        if window is not None:
            kept = [s for s in kept if s < sinks or t - s < window]
        scores = []
        for place, s in enumerate(kept):
            q, k = q_TH[t], k_TH[s]
            if frequency is not None:
                q, k = turned(q, len(kept) - 1, frequency), turned(k, place, frequency)
            distance = len(kept) - 1 - place
            scores.append(temperature * (q @ k) / math.sqrt(H) - slope * distance)
        weights = np.exp(np.array(scores) - max(scores))
        y_TH[t] = (weights / weights.sum()) @ v_TH[kept]
    return y_TH
