"""The menu of mixers, and the block and stack that run them (filled in below)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.nn.attention import AttentionConfig
from valkyrie_core.nn.ffn import SwiGLUConfig
from valkyrie_core.nn.rwkv import ChannelMixConfig, RWKV7Config

TokenMixer = Annotated[AttentionConfig | RWKV7Config, Discriminator("type")]
ChannelMixer = Annotated[SwiGLUConfig | ChannelMixConfig, Discriminator("type")]


class BlockConfig(Config):
    """One residual block: a token mixer, then a channel mixer."""

    mixer: TokenMixer
    """How positions exchange information."""
    ffn: ChannelMixer
    """What happens at one position."""


class StackConfig(Config):
    """Blocks in the order of a pattern, each with weights of its own."""

    type: Literal["stack"] = "stack"
    blocks: dict[str, BlockConfig] = Field(min_length=1)
    """Named blocks."""
    pattern: tuple[str, ...] = Field(min_length=1)
    """Names of blocks, first layer first."""
    repeat: int = Field(default=1, ge=1)
    """How many times the pattern is laid."""

    @model_validator(mode="after")
    def _pattern_names_blocks(self) -> StackConfig:
        for name in self.pattern:
            if name not in self.blocks:
                known = ", ".join(self.blocks)
                raise ValueError(f"the pattern names {name!r}; the blocks are {known}")
        for name in self.blocks:
            if name not in self.pattern:
                raise ValueError(f"the block {name!r} is not in the pattern")
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer's block, first layer first."""
        return self.pattern * self.repeat
