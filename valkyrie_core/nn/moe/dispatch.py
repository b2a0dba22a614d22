"""Tokens to experts and back: sorted by expert, none dropped, none padded.

Shapes: R tokens, D model, K slots of a token, E experts, M entries (a token at one of its experts).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from valkyrie_core.nn.moe.gates import Choice


class Entries(NamedTuple):
    """The tokens of all experts, expert by expert, each one's in the order of the batch."""

    tokens_M: Tensor
    """Which token; increasing within an expert."""
    slots_M: Tensor
    """Which of its slots."""
    experts_M: Tensor
    """Which expert; increasing."""
    sizes: tuple[int, ...]
    """Entries of every expert."""
    num_slots: int
    """Slots of a token, used or not."""
    places_RK: Tensor
    """Which entry a token's slot is; below 0: it is not used."""


def entries(choice: Choice, num_experts: int) -> Entries:
    """Sorts what was chosen by expert."""
    R, K = choice.experts_RK.shape
    flat_M = choice.experts_RK.flatten()
    if isinstance(flat_M, FakeTensor):
        # without numbers: every slot is used, and experts alike
        even = [R * K // num_experts + (e < R * K % num_experts) for e in range(num_experts)]
        order_M = torch.arange(R * K, device=flat_M.device)
        return Entries(order_M // K, order_M % K, flat_M, tuple(even), K, order_M.view(R, K))
    if choice.used_RK is not None:
        # what is not used stands behind the last expert
        flat_M = flat_M.masked_fill(~choice.used_RK.flatten(), num_experts)
    sorted_M, order_M = flat_M.sort(stable=True)
    sizes = torch.bincount(flat_M, minlength=num_experts + 1)[:num_experts].tolist()
    total = sum(sizes)
    order_M = order_M[:total]
    places_M = torch.arange(total, device=order_M.device)
    places = torch.full_like(flat_M, -1).scatter(0, order_M, places_M)
    return Entries(order_M // K, order_M % K, sorted_M[:total], tuple(sizes), K, places.view(R, K))
