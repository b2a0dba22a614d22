"""SwiGLU (filled in below)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.config import Config


class SwiGLUConfig(Config):
    """Gated linear unit with SiLU (Shazeer 2020, arXiv 2002.05202)."""

    type: Literal["swiglu"] = "swiglu"
    hidden_dim: int | None = Field(default=None, ge=1)
    """Width of the hidden layer; left out, 8/3 x dim rounded up to a multiple of 32."""
