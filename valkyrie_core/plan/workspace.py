"""Memory that an operator takes while it runs and gives back before it returns.

Fake tensors show what an operator takes and gives, not what it holds inside. Only what is large
stands here; buffers of a few kilobytes per thread do not matter.
"""

from __future__ import annotations

from typing import Any

import torch

from valkyrie_core.kernels.loss import CHUNK_BYTES


def workspace(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a call holds at most beside its arguments and its results."""
    if operator is torch.ops.valkyrie.linear_cross_entropy.default:
        return _linear_cross_entropy(*args)
    return 0


def _linear_cross_entropy(
    x: Any, weight: Any, targets: Any, dtype: torch.dtype, of_x: bool, of_weight: bool
) -> int:
    """A chunk of logits; inputs and weights in the type of the products; a chunk's share of the
    gradient of the weights."""
    R, (V, D) = x.shape[0], weight.shape
    logits = min(R * V * dtype.itemsize, CHUNK_BYTES)
    casts = sum(t.numel() * dtype.itemsize for t in (x, weight) if t.dtype != dtype)
    share = V * D * dtype.itemsize if of_weight else 0
    return int(logits + casts + share)
