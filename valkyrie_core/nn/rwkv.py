"""RWKV-7 time mix and channel mix (filled in below)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.config import Config


class RWKV7Config(Config):
    """RWKV-7 time mix: a generalised delta rule with data-dependent decay (arXiv 2503.14456)."""

    type: Literal["rwkv7"] = "rwkv7"
    head_dim: int = Field(default=64, ge=4)
    """Width of one head; `dim` must be a multiple of it."""
    decay_rank: int | None = Field(default=None, ge=1)
    """Rank of the decay's low-rank map; left out, the author's rule by width."""
    rate_rank: int | None = Field(default=None, ge=1)
    """Rank of the in-context learning rate's map; left out, the author's rule."""
    value_rank: int | None = Field(default=None, ge=1)
    """Rank of the value residual's map; left out, the author's rule."""
    gate_rank: int | None = Field(default=None, ge=1)
    """Rank of the output gate's map; left out, the author's rule."""


class ChannelMixConfig(Config):
    """RWKV-7 channel mix: token shift, then a squared-ReLU two-layer network."""

    type: Literal["channel_mix"] = "channel_mix"
    hidden_dim: int | None = Field(default=None, ge=1)
    """Width of the hidden layer; left out, 4 x dim."""
