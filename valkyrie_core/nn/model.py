"""HybridLM: embedding, core, head.

| part | initial weights |
|---|---|
| embedding | uniform +-1e-4 (a norm follows it) |
| head | orthogonal, gain 0.5 sqrt(V / D) where V > D, else 0.5 |
| mixers' input matrices | orthogonal, gain 1 (RWKV-7 key: 0.1) |
| mixers' output matrices | zero |
| RWKV-7 vectors and low-rank maps | the author's table, in `nn/rwkv.py` |

Shapes: B batch, T time, D model, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.kernels.loss import IGNORED as IGNORED
from valkyrie_core.kernels.loss import fused_serves, linear_cross_entropy
from valkyrie_core.nn.block import Block, Norm, build_norm
from valkyrie_core.nn.core import Core, CoreConfig
from valkyrie_core.nn.halting import Confidence
from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.rwkv import RWKV7Config
from valkyrie_core.nn.state import NO_DOCUMENT, Cost, Ctx, LMState, Routed, enter
from valkyrie_core.nn.storage_type import store, widened

LOGITS_AT_ONCE = 1 << 22
"""Logits of a chunk of the loss: 16 MiB in fp32, whatever the vocabulary."""
Loss = Callable[..., tuple[Tensor, LMState, Any]]
"""`HybridLM.loss`, or what was compiled from it."""


class HybridLMConfig(Config):
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
    def _widths_divide(self) -> HybridLMConfig:
        for name, block in self.core.blocks.items():
            mixer = block.mixer
            at = ("core", "blocks", name, "mixer")
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


class LMOutput(NamedTuple):
    """What a forward pass gives back."""

    logits_BTV: Tensor
    state: LMState
    told: Told


class Told(NamedTuple):
    """What the layers say besides their output."""

    aux: dict[str, Tensor]
    """Auxiliary losses by name, already weighted, summed over the layers."""
    routed: tuple[Routed, ...]
    """What the routers did, first layer first."""


class Head(nn.Linear):
    """The output layer, told apart from hidden matrices by its role."""

    roles: ClassVar[dict[str, Role]] = {"weight": "head"}

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Logits."""
        return F.linear(x_BTD, widened(self.weight, x_BTD.dtype))


class HybridLM(nn.Module):
    """A causal language model over blocks of any mixers.

    Weights are drawn from torch's global generator: seed it first. The state is a value: pass the
    returned one on to continue, keep the old one to fork.
    """

    _enter = staticmethod(enter)

    def __init__(self, config: HybridLMConfig, matrices: torch.dtype = torch.float32) -> None:
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
        config: HybridLMConfig,
        device: torch.device | str = "cpu",
        matrices: torch.dtype = torch.float32,
    ) -> HybridLM:
        """A model whose weights are still to be read: no time is spent on drawing any."""
        with torch.device("meta"):
            model = cls(config, matrices)
        model.to_empty(device=device)
        if config.head == "tied":
            # moving has made two of the one
            model.head.weight = model.embedding.weight
        return model

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

    def forward(self, tokens_BT: Tensor, state: LMState, doc_BT: Tensor | None = None) -> LMOutput:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids; what stands at padding does not matter.
            state: from `init_state` or an earlier call.
            doc_BT: document ids. Position 0 continues the state's document if the id is the same,
                else it starts fresh; -1 is padding and changes nothing. None: all tokens continue
                the state's document.
        """
        x_BTD, state, ctx = self._hidden(tokens_BT, state, doc_BT)
        return LMOutput(self.head(x_BTD), state, _told(ctx))

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None = None,
    ) -> tuple[Tensor, LMState, Told]:
        """Mean cross-entropy in nats over the scored targets (-100 is not), plus auxiliary losses.

        The logits are made and consumed in chunks, never held all at once; where native code
        serves, their gradients are made with them, else the backward pass makes them again.
        """
        x_BTD, state, ctx = self._hidden(tokens_BT, state, doc_BT)
        x_RD, targets_R = x_BTD.flatten(0, 1), targets_BT.flatten()
        if fused_serves(x_RD, self.head.weight):
            nats = linear_cross_entropy(x_RD, self.head.weight, targets_R)
        else:
            nats = self._cross_entropy(x_BTD, targets_BT).sum()
        loss = nats / (targets_BT != IGNORED).sum().clamp(min=1)
        if ctx.between:
            ctx = ctx._replace(aux=(*ctx.aux, *self._between(ctx, x_BTD, targets_BT)))
        for _, value in ctx.aux:
            loss = loss + value
        return loss, state, _told(ctx)

    def _between(self, ctx: Ctx, x_BTD: Tensor, targets_BT: Tensor) -> list[tuple[str, Tensor]]:
        """Losses of what stands between loops: of the head, and of the confidence in it."""
        assert isinstance(self.core, Recursive)
        found = []
        scored_BT = targets_BT != IGNORED
        scored = scored_BT.sum().clamp(min=1)
        if self.core.loop_loss:
            nats = [
                self._cross_entropy(self.head_norm(h_BTD), targets_BT).sum()
                for h_BTD in ctx.between
            ]
            found.append(("loops", self.core.loop_loss * torch.stack(nats).mean() / scored))
        if isinstance(self.core.halting, Confidence):
            with torch.no_grad():
                last_R = self.head(x_BTD[scored_BT]).argmax(-1)
            losses = []
            for h_BTD in ctx.between:
                # it learns what more loops would say, and moves nothing but itself
                h_RD = h_BTD[scored_BT].detach()
                with torch.no_grad():
                    agrees_R = self._readout(h_RD).argmax(-1) == last_R
                logits_R = self.core.halting.logits(h_RD)
                losses.append(
                    F.binary_cross_entropy_with_logits(
                        logits_R, agrees_R.to(logits_R.dtype), reduction="sum"
                    )
                )
            found.append(("confidence", torch.stack(losses).mean() / scored))
        return found

    def compiled_loss(self, mode: str) -> Loss:
        """`loss` by way of torch.compile, for one shape of window."""
        # it looks at values (is there padding?), which a compiled graph can't. Said here and not
        # beside it: saying it imports the compiler, which takes a second
        self._enter = torch.compiler.disable(enter)  # type: ignore[no-untyped-call]
        for module in self.modules():
            if isinstance(module, MoE):
                # how many tokens each expert gets is another number at every step
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]
        # static shapes: with dynamic ones the bits would depend on what was seen before
        return torch.compile(self.loss, dynamic=False, mode=mode)

    def token_losses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None = None,
    ) -> tuple[Tensor, LMState]:
        """[B, T] cross-entropy in nats of every target, 0 where it is not scored."""
        x_BTD, state, _ = self._hidden(tokens_BT, state, doc_BT)
        return self._cross_entropy(x_BTD, targets_BT).view(targets_BT.shape), state

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

    def _hidden(
        self, tokens_BT: Tensor, state: LMState, doc_BT: Tensor | None
    ) -> tuple[Tensor, LMState, Ctx]:
        ctx, moved = self._enter(state, tokens_BT, doc_BT)
        x_BTD = self.embedding(tokens_BT).to(next(self.head_norm.parameters()).dtype)
        x_BTD = self.embedding_norm(x_BTD)
        if isinstance(self.core, Recursive):
            x_BTD, layers, ctx = self.core(x_BTD, state.layers, ctx, self._readout)
        else:
            x_BTD, layers, ctx = self.core(x_BTD, state.layers, ctx)
        return self.head_norm(x_BTD), moved._replace(layers=layers), ctx

    def _readout(self, h_RD: Tensor) -> Tensor:
        logits_RV: Tensor = self.head(self.head_norm(h_RD))
        return logits_RV

    def _cross_entropy(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        x_RD, targets_R = x_BTD.flatten(0, 1), targets_BT.flatten()
        rows = max(1, LOGITS_AT_ONCE // self.head.out_features)
        if x_RD.shape[0] <= rows:
            return self._chunk_cross_entropy(x_RD, targets_R)
        pieces = []
        for start in range(0, x_RD.shape[0], rows):
            piece = (x_RD[start : start + rows], targets_R[start : start + rows])
            if torch.is_grad_enabled():
                # the backward pass makes the chunk's logits again
                pieces.append(checkpoint(self._chunk_cross_entropy, *piece, use_reentrant=False))
            else:
                pieces.append(self._chunk_cross_entropy(*piece))
        return torch.cat(pieces)

    def _chunk_cross_entropy(self, x_RD: Tensor, targets_R: Tensor) -> Tensor:
        logits_RV = self.head(x_RD)
        precise = torch.promote_types(logits_RV.dtype, torch.float32)
        return F.cross_entropy(
            logits_RV.to(precise), targets_R, ignore_index=IGNORED, reduction="none"
        )


def _told(ctx: Ctx) -> Told:
    aux: dict[str, Tensor] = {}
    for name, value in ctx.aux:
        aux[name] = aux[name] + value if name in aux else value
    return Told(aux, ctx.routed)
