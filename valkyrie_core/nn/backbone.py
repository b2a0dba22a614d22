"""What every model has: an embedding, a core of blocks, and a head.

| part | initial weights |
|---|---|
| embedding | uniform +-1e-4 (a norm follows it) |
| head | orthogonal, gain 0.5 sqrt(V / D) where V > D, else 0.5 |
| mixers' input matrices | orthogonal, gain 1 (RWKV-7 key: 0.1) |
| mixers' output matrices | zero |
| RWKV-7 vectors and low-rank maps | the author's table, in `nn/rwkv.py` |

Shapes: B batch, T time, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.nn.block import Block, Norm, build_norm
from valkyrie_core.nn.core import Core, CoreConfig
from valkyrie_core.nn.hierarchical import HierarchicalConfig
from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.recursive import RecursiveConfig
from valkyrie_core.nn.routed import Routable, RoutedConfig
from valkyrie_core.nn.rwkv import RWKV7Config
from valkyrie_core.nn.skip import SkipConfig
from valkyrie_core.nn.state import NO_DOCUMENT, Cost, Ctx, LMState, Route, Routed
from valkyrie_core.nn.storage_type import store, widened
from valkyrie_core.nn.structure import StructureConfig


class ModelConfig(Config):
    """A language model: embedding, a core of blocks, a head."""

    vocab_size: int | None = Field(default=None, ge=2)
    """Number of token ids; a recipe leaves it out and takes the tokenizer's."""
    dim: int = Field(ge=4)
    """Width of the residual stream."""
    norm: Norm = "layer_norm"
    """The normalisation before every mixer; RWKV-7 uses layer_norm."""
    head: Literal["linear", "tied"] = "linear"
    """The output layer: a matrix of its own, or the embedding's."""
    core: CoreConfig
    """The blocks and their order."""

    @model_validator(mode="after")
    def _widths_divide(self) -> ModelConfig:
        for at, mixer in self.mixers():
            if isinstance(mixer, SkipConfig):
                continue
            if isinstance(mixer, RWKV7Config):
                if self.dim % mixer.head_dim:
                    raise MisfitError(
                        f"head_dim ({mixer.head_dim}) must divide dim ({self.dim})",
                        (*at, "head_dim"),
                    )
                continue
            if self.dim % mixer.num_heads:
                raise MisfitError(
                    f"num_heads ({mixer.num_heads}) must divide dim ({self.dim})",
                    (*at, "num_heads"),
                )
            if mixer.num_kv_heads is not None and mixer.num_heads % mixer.num_kv_heads:
                raise MisfitError(
                    f"num_kv_heads ({mixer.num_kv_heads}) must divide "
                    f"num_heads ({mixer.num_heads})",
                    (*at, "num_kv_heads"),
                )
        return self

    def mixers(self) -> Iterator[tuple[tuple[str, ...], Routable]]:
        """Where each mixer stands, and itself; of one that is made of mixers those."""
        for name, block in self.core.blocks.items():
            at = ("core", "blocks", name, "mixer")
            if isinstance(block.mixer, RoutedConfig):
                for inner, mixer in block.mixer.mixers.items():
                    yield (*at, "mixers", inner), mixer
            elif isinstance(block.mixer, HierarchicalConfig):
                yield (*at, "inner"), block.mixer.inner
            elif isinstance(block.mixer, StructureConfig):
                yield at, block.mixer.attention
            else:
                yield at, block.mixer


class Told(NamedTuple):
    """What the layers say besides their output."""

    aux: dict[str, Tensor]
    """Auxiliary losses by name, already weighted, summed over the layers."""
    routed: tuple[Routed, ...]
    """What the routers did, first layer first."""
    routes: tuple[Route, ...] = ()
    """What routers among mixers did, first layer first."""
    loops_BT: Tensor | None = None
    """How many loops each token ran through, where tokens halt."""


class Head(nn.Linear):
    """The output layer, told apart from hidden matrices by its role."""

    roles: ClassVar[dict[str, Role]] = {"weight": "head"}

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Logits."""
        return F.linear(x_BTD, widened(self.weight, x_BTD.dtype))


class Backbone(nn.Module):
    """The parts of a model, and what they cost; how they are run is a subclass's business.

    Weights are drawn from torch's global generator: seed it first.
    """

    def __init__(self, config: ModelConfig, matrices: torch.dtype = torch.float32) -> None:
        """
        Args:
            matrices: the type that matrices are stored in; see `nn/storage_type.py`.
        """
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set; a recipe takes it from its tokenizer")
        self.config = config
        V, D = config.vocab_size, config.dim
        self.embedding = nn.Embedding(V, D)
        self.embedding_norm = build_norm(config.norm, D)
        self.core: Core = config.core.build(D, config.norm, matrices)
        self.head_norm = build_norm(config.norm, D)
        nn.init.uniform_(self.embedding.weight, -1e-4, 1e-4)
        self.head = Head(D, V, bias=False)
        if config.head == "tied":
            # the norm after the embedding makes its scale free, so the head's scale is right
            self.head.weight = self.embedding.weight
        nn.init.orthogonal_(self.head.weight, gain=0.5 * math.sqrt(max(1.0, V / D)))
        store(self, matrices)

    @classmethod
    def unfilled(
        cls,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        matrices: torch.dtype = torch.float32,
    ) -> Self:
        """A model whose weights are still to be read: no time is spent on drawing any."""
        with torch.device("meta"):
            model = cls(config, matrices)
        model.to_empty(device=device)
        if config.head == "tied":
            # moving has made two of the one
            model.head.weight = model.embedding.weight
        return model

    @property
    def memory_tokens(self) -> int:
        """Empty tokens at the beginning of every document that it reads."""
        core = self.config.core
        return core.memory_tokens if isinstance(core, RecursiveConfig) else 0

    @property
    def matrices(self) -> torch.dtype:
        """The type that matrices are stored in."""
        return self.embedding.weight.dtype

    def init_state(self, batch_size: int) -> LMState:
        """The state before any token, on the model's device."""
        # of what the residual stream is made of, however matrices are stored
        weight = next(self.head_norm.parameters())
        counter = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        layers = self.core.init_state(batch_size, device=weight.device, dtype=weight.dtype)
        return LMState(layers, counter + NO_DOCUMENT, counter, counter)

    def flops_per_token(self, context_len: int) -> dict[str, int]:
        """Forward operations per token by part; a training step costs three times as much."""
        flops: dict[str, int] = {}
        for kind, cost in self.costs(context_len):
            flops[kind] = flops.get(kind, 0) + cost.flops_per_token
        return {**flops, "head": 2 * self.head.weight.numel()}

    def blocks(self) -> list[Block]:
        """The block of every pass, first pass first: a layer that is looped comes as often."""
        layers = [layer for layer in self.core.layers if isinstance(layer, Block)]
        return [layers[index] for index in self.core.passes]

    def costs(self, context_len: int, value_bytes: int = 4) -> list[tuple[str, Cost]]:
        """What every mixer of every pass costs, with its type, in the order in which they run."""
        found: list[tuple[str, Cost]] = []
        for index, block in zip(self.core.passes, self.blocks(), strict=True):
            costs = block.costs(context_len, value_bytes)
            found += zip(self.core.types[index], costs, strict=True)
        return found

    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())


def tell(ctx: Ctx) -> Told:
    """What the layers said besides their output."""
    aux: dict[str, Tensor] = {}
    for name, value in ctx.aux:
        aux[name] = aux[name] + value if name in aux else value
    return Told(aux, ctx.routed, ctx.routes, ctx.loops_BT)
