"""The mixer that does nothing: what a router has for tokens that need no mixing.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from valkyrie_core.config import Config
from valkyrie_core.nn.state import Cost, Ctx


class SkipConfig(Config):
    """Nothing: the token keeps what stands at it, and costs nothing."""

    type: Literal["skip"] = "skip"

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> Skip:
        """The module this section describes."""
        return Skip()


class Skip(nn.Module):
    """Zeros."""

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> tuple[()]:
        """Nothing is remembered."""
        return ()

    def forward(self, x_BTD: Tensor, state: tuple[()], ctx: Ctx) -> tuple[Tensor, tuple[()], Ctx]:
        """Adds nothing."""
        return torch.zeros_like(x_BTD), state, ctx

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """Nothing."""
        return Cost(0, 0, 0, 0)
