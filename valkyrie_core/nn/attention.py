"""Grouped-query attention with rotary positions and QK norm (filled in below)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.config import Config


class RopeConfig(Config):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    type: Literal["rope"] = "rope"
    theta: float = Field(default=10_000.0, gt=1)
    """The longest wavelength, in tokens, over 2 pi."""


class NoPositionConfig(Config):
    """No positions: the order comes from recurrent layers below."""

    type: Literal["none"] = "none"


class AttentionConfig(Config):
    """Causal grouped-query attention through torch's scaled_dot_product_attention."""

    type: Literal["attention"] = "attention"
    num_heads: int = Field(default=8, ge=1)
    """Query heads; `dim` must be a multiple of it."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads; must divide num_heads. Left out: as many as query heads."""
    position: RopeConfig | NoPositionConfig = Field(default=RopeConfig(), discriminator="type")
    """How positions enter."""
