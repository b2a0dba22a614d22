"""SwiGLU, the channel mixer of today's transformers (Shazeer 2020, arXiv 2002.05202).

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from valkyrie_core.config import Config
from valkyrie_core.kernels.gated import silu_times
from valkyrie_core.nn.state import Cost, Ctx


class SwiGLUConfig(Config):
    """Gated linear unit with SiLU (Shazeer 2020, arXiv 2002.05202)."""

    type: Literal["swiglu"] = "swiglu"
    hidden_dim: int | None = Field(default=None, ge=1)
    """Width of the hidden layer; left out, 8/3 x dim rounded up to a multiple of 32."""

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> SwiGLU:
        """The module this section describes."""
        return SwiGLU(dim, self.hidden_dim or -(-dim * 8 // (3 * 32)) * 32)

    def resized(self, hidden_dim: int) -> SwiGLUConfig:
        """The same, with another hidden width."""
        return self.model_copy(update={"hidden_dim": hidden_dim})


class SwiGLU(nn.Module):
    """y = W_down(silu(W_gate x) * W_up x); has no state."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        nn.init.orthogonal_(self.gate.weight)
        nn.init.orthogonal_(self.up.weight)
        nn.init.zeros_(self.down.weight)

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden layer."""
        return self.up.out_features

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def forward(self, x_BTD: Tensor, state: tuple[()], ctx: Ctx) -> tuple[Tensor, tuple[()], Ctx]:
        """Acts on every position by itself."""
        return self.down(silu_times(self.gate(x_BTD), self.up(x_BTD))), state, ctx

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """Three matrices; every token alike."""
        flops = 2 * 3 * self.up.weight.numel()
        return Cost(flops, 3 * flops, flops, 0)
