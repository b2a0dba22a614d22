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
from valkyrie_core.nn.hierarchical import HierarchicalConfig
from valkyrie_core.nn.moe.layer import MoEConfig
from valkyrie_core.nn.routed import RoutedConfig
from valkyrie_core.nn.rwkv import ChannelMixConfig, RWKV7Config
from valkyrie_core.nn.state import Cost, Ctx
from valkyrie_core.nn.storage_type import call, store
from valkyrie_core.nn.structure import StructureConfig

Norm = Literal["layer_norm", "rms_norm"]
Said = Literal["attended_BTD", "recurred_BTD"]
SAID: dict[str, Said] = {"attention": "attended_BTD", "rwkv7": "recurred_BTD"}
"""Where the context keeps what the latest layer of a kind made, where layers hear each other."""

TokenMixer = Annotated[
    AttentionConfig | HierarchicalConfig | RoutedConfig | RWKV7Config | StructureConfig,
    Discriminator("type"),
]
ChannelMixer = Annotated[SwiGLUConfig | ChannelMixConfig | MoEConfig, Discriminator("type")]


class BlockConfig(Config):
    """One residual block: a token mixer, then a channel mixer."""

    mixer: TokenMixer
    """How positions exchange information."""
    ffn: ChannelMixer
    """What happens at one position."""


class FeedbackConfig(Config):
    """Recurrence and attention hear each other: a mixer's input has what the latest layer of the
    other kind made, normed and gated by channel; the gates begin at zero."""

    type: Literal["gated"] = "gated"


class StackConfig(Config):
    """Blocks in the order of a pattern, each with weights of its own."""

    type: Literal["stack"] = "stack"
    blocks: dict[str, BlockConfig] = Field(min_length=1)
    """Named blocks."""
    pattern: tuple[str, ...] = Field(min_length=1)
    """Names of blocks, first layer first."""
    repeat: int = Field(default=1, ge=1)
    """How many times the pattern is laid."""
    feedback: FeedbackConfig | None = None
    """What layers of recurrence and of attention tell each other; left out: nothing but what
    stands in the residual stream."""

    @model_validator(mode="after")
    def _pattern_names_blocks(self) -> StackConfig:
        for index, name in enumerate(self.pattern):
            if name not in self.blocks:
                known = ", ".join(self.blocks)
                raise MisfitError(f"no block {name!r} - the blocks are {known}", ("pattern", index))
        for name in self.blocks:
            if name not in self.pattern:
                raise MisfitError("the pattern does not name this block", ("blocks", name))
        kinds = {block.mixer.type for block in self.blocks.values()}
        if self.feedback is not None and kinds != {"attention", "rwkv7"}:
            raise MisfitError(
                "it is between layers of attention and of rwkv7, and the blocks have "
                + " and ".join(sorted(kinds)),
                ("feedback",),
            )
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer's block, first layer first."""
        return self.pattern * self.repeat

    def build(self, dim: int, norm: Norm, matrices: torch.dtype = torch.float32) -> Stack:
        """The module this section describes, its matrices stored in that type."""
        return Stack(dim, self, norm, matrices)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)).

    One that hears has x + gate * norm(what the latest layer of the other kind made) in the place
    of its mixer's x.
    """

    def __init__(
        self,
        dim: int,
        config: BlockConfig,
        norm: Norm,
        *,
        layer_idx: int,
        num_layers: int,
        says: Said | None = None,
        hears: bool = False,
    ) -> None:
        """
        Args:
            says: where what its mixer makes is left for layers of the other kind; None: nowhere.
            hears: there is an earlier layer of the other kind, and it is heard.
        """
        super().__init__()
        self.says = says
        self.heard_norm = build_norm(norm, dim) if hears else None
        self.heard_D = nn.Parameter(torch.zeros(dim)) if hears else None
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
        own_BTD = x_BTD
        if self.heard_norm is not None:
            other_BTD = ctx.attended_BTD if self.says == "recurred_BTD" else ctx.recurred_BTD
            own_BTD = x_BTD + self.heard_D * self.heard_norm(other_BTD)
        y_BTD, mixer_state, ctx = self.mixer(self.mixer_norm(own_BTD), state[0], ctx)
        if self.says is not None:
            ctx = ctx._replace(**{self.says: y_BTD})
        x_BTD = x_BTD + y_BTD
        y_BTD, ffn_state, ctx = self.ffn(self.ffn_norm(x_BTD), state[1], ctx)
        return x_BTD + y_BTD, (mixer_state, ffn_state), ctx

    @property
    def heard_parameters(self) -> int:
        """Parameters of what is heard of other layers."""
        if self.heard_D is None or self.heard_norm is None:
            return 0
        return self.heard_D.numel() + sum(one.numel() for one in self.heard_norm.parameters())

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
        self.layers = build_layers(
            dim, chosen, norm, matrices, feedback=config.feedback is not None
        )
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
    dim: int,
    chosen: Sequence[BlockConfig],
    norm: Norm,
    matrices: torch.dtype,
    *,
    feedback: bool = False,
) -> nn.ModuleList:
    """The blocks of a core, first layer first, their matrices stored in that type.

    Args:
        feedback: layers hear the latest one of the other kind, where there is one before them.
    """
    layers = nn.ModuleList()
    for i, config in enumerate(chosen):
        own, says = config.mixer.type, None
        if feedback:
            says = SAID[own]
        hears = feedback and any(one.mixer.type != own for one in chosen[:i])
        block = Block(
            dim, config, norm, layer_idx=i, num_layers=len(chosen), says=says, hears=hears
        )
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
