"""HybridLM: embedding, core, head (filled in below)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.nn.block import StackConfig
from valkyrie_core.nn.rwkv import RWKV7Config


class HybridLMConfig(Config):
    """A language model: embedding, a core of blocks, a head."""

    vocab_size: int | None = Field(default=None, ge=2)
    """Number of token ids; a recipe leaves it out and takes the tokenizer's."""
    dim: int = Field(ge=4)
    """Width of the residual stream."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """The normalisation before every mixer; RWKV-7 uses layer_norm."""
    head: Literal["linear", "tied"] = "linear"
    """The output layer: a matrix of its own, or the embedding's."""
    core: StackConfig
    """The blocks and their order."""

    @model_validator(mode="after")
    def _widths_divide(self) -> HybridLMConfig:
        for name, block in self.core.blocks.items():
            mixer = block.mixer
            if isinstance(mixer, RWKV7Config):
                if self.dim % mixer.head_dim:
                    raise ValueError(
                        f"block {name!r}: head_dim ({mixer.head_dim}) must divide dim ({self.dim})"
                    )
                continue
            if self.dim % mixer.num_heads:
                raise ValueError(
                    f"block {name!r}: num_heads ({mixer.num_heads}) must divide dim ({self.dim})"
                )
            if mixer.num_kv_heads is not None and mixer.num_heads % mixer.num_kv_heads:
                raise ValueError(
                    f"block {name!r}: num_kv_heads ({mixer.num_kv_heads}) must divide "
                    f"num_heads ({mixer.num_heads})"
                )
        return self
