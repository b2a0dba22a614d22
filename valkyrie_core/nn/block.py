"""The menu of mixers, and the block and the stack that run them.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.nn.attention import AttentionConfig
from valkyrie_core.nn.ffn import SwiGLUConfig
from valkyrie_core.nn.moe.layer import MoEConfig
from valkyrie_core.nn.routed import RoutedConfig
from valkyrie_core.nn.rwkv import ChannelMixConfig, RWKV7Config
from valkyrie_core.nn.state import Cost, Ctx
from valkyrie_core.nn.storage_type import call, store

Norm = Literal["layer_norm", "rms_norm"]

TokenMixer = Annotated[AttentionConfig | RoutedConfig | RWKV7Config, Discriminator("type")]
ChannelMixer = Annotated[SwiGLUConfig | ChannelMixConfig | MoEConfig, Discriminator("type")]


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
        for index, name in enumerate(self.pattern):
            if name not in self.blocks:
                known = ", ".join(self.blocks)
                raise MisfitError(f"no block {name!r} - the blocks are {known}", ("pattern", index))
        for name in self.blocks:
            if name not in self.pattern:
                raise MisfitError("the pattern does not name this block", ("blocks", name))
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer's block, first layer first."""
        return self.pattern * self.repeat

    def build(self, dim: int, norm: Norm, matrices: torch.dtype = torch.float32) -> Stack:
        """The module this section describes, its matrices stored in that type."""
        return Stack(dim, self, norm, matrices)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self, dim: int, config: BlockConfig, norm: Norm, *, layer_idx: int, num_layers: int
    ) -> None:
        super().__init__()
        self.mixer_norm = build_norm(norm, dim)
        self.mixer = config.mixer.build(dim, layer_idx=layer_idx, num_layers=num_layers)
        self.ffn_norm = build_norm(norm, dim)
        self.ffn = config.ffn.build(dim, layer_idx=layer_idx, num_layers=num_layers)

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Any]:
        """The states of the two mixers."""
        return (
            self.mixer.init_state(batch_size, device=device, dtype=dtype),
            self.ffn.init_state(batch_size, device=device, dtype=dtype),
        )

    def forward(
        self, x_BTD: Tensor, state: tuple[Any, Any], ctx: Ctx
    ) -> tuple[Tensor, tuple[Any, Any], Ctx]:
        """One residual block."""
        y_BTD, mixer_state, ctx = self.mixer(self.mixer_norm(x_BTD), state[0], ctx)
        x_BTD = x_BTD + y_BTD
        y_BTD, ffn_state, ctx = self.ffn(self.ffn_norm(x_BTD), state[1], ctx)
        return x_BTD + y_BTD, (mixer_state, ffn_state), ctx

    def costs(self, context_len: int, value_bytes: int = 4) -> tuple[Cost, Cost]:
        """What its token mixer and its channel mixer cost."""
        return (
            self.mixer.cost(context_len, value_bytes),
            self.ffn.cost(context_len, value_bytes),
        )


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(
        self, dim: int, config: StackConfig, norm: Norm, matrices: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.recomputes = False
        """Whether the backward pass computes each layer again instead of keeping its inside."""
        chosen = [config.blocks[name] for name in config.layers]
        self.layers = build_layers(dim, chosen, norm, matrices)
        self.types = tuple((block.mixer.type, block.ffn.type) for block in chosen)

    @property
    def passes(self) -> tuple[int, ...]:
        """The layer of every pass, first pass first: each runs once."""
        return tuple(range(len(self.layers)))

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """The states of all layers."""
        blocks = [layer for layer in self.layers if isinstance(layer, Block)]
        return tuple(b.init_state(batch_size, device=device, dtype=dtype) for b in blocks)

    def forward(
        self, x_BTD: Tensor, state: tuple[Any, ...], ctx: Ctx
    ) -> tuple[Tensor, tuple[Any, ...], Ctx]:
        """Runs every layer once."""
        states = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            x_BTD, layer_state, ctx = run_layer(
                layer, x_BTD, layer_state, ctx, recomputes=self.recomputes
            )
            states.append(layer_state)
        return x_BTD, tuple(states), ctx


def build_layers(
    dim: int, chosen: Sequence[BlockConfig], norm: Norm, matrices: torch.dtype
) -> nn.ModuleList:
    """The blocks of a core, first layer first, their matrices stored in that type."""
    layers = nn.ModuleList()
    for i, config in enumerate(chosen):
        block = Block(dim, config, norm, layer_idx=i, num_layers=len(chosen))
        # before the next one is made: two models in fp32 may not fit
        store(block, matrices)
        layers.append(block)
    return layers


def run_layer(
    layer: nn.Module, x_BTD: Tensor, state: tuple[Any, Any], ctx: Ctx, *, recomputes: bool
) -> Any:
    """What the layer gives back; where it recomputes, its inside is not kept for gradients."""
    if recomputes and torch.is_grad_enabled():
        return checkpoint(call, layer, x_BTD, state, ctx, use_reentrant=False)
    return call(layer, x_BTD, state, ctx)


def build_norm(norm: Norm, dim: int) -> nn.Module:
    """LayerNorm with bias, or RMSNorm."""
    return nn.LayerNorm(dim) if norm == "layer_norm" else nn.RMSNorm(dim, eps=1e-6)
