"""Blocks that run several times: depth without parameters, as in looped language models.

    e = prelude(x), h_0 = 0
    h_t = pattern(norm(h_{t-1} + inject * e)) + keep_t * h_{t-1}
    y = coda(h_L)

The blocks of the pattern have the same weights in every loop (Universal Transformers, arXiv
1807.03819; Saunshi et al., 2502.17416). Their input is injected anew (2502.05171), a norm inside of
the loop keeps the scale, and a gate by loop and channel, zero at first, lets through what was
before (2605.20670). From one loop to the next only what stands at a position passes: the final
state of a recurrence would tell of the future. Each loop has states and caches of its own.

Shapes: B batch, T time, D model, L loops.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.nn.block import Block, BlockConfig, Norm, build_norm
from valkyrie_core.nn.state import Ctx
from valkyrie_core.nn.storage_type import call, store


class RecursiveConfig(Config):
    """A pattern of blocks that is run several times, between blocks that run once."""

    type: Literal["recursive"] = "recursive"
    blocks: dict[str, BlockConfig] = Field(min_length=1)
    """Named blocks."""
    prelude: tuple[str, ...] = ()
    """Names of blocks that run once, before the loops."""
    pattern: tuple[str, ...] = Field(min_length=1)
    """Names of the blocks of a loop; a name that comes twice has weights of its own each time."""
    coda: tuple[str, ...] = ()
    """Names of blocks that run once, after the loops."""
    loops: int = Field(default=4, ge=1)
    """How many times the pattern runs."""
    loop_loss: float = Field(default=0.0, ge=0)
    """In training, the weight of the mean loss that the head has after the earlier loops."""

    @model_validator(mode="after")
    def _parts_name_blocks(self) -> RecursiveConfig:
        for part in ("prelude", "pattern", "coda"):
            for index, name in enumerate(getattr(self, part)):
                if name not in self.blocks:
                    known = ", ".join(self.blocks)
                    raise MisfitError(f"no block {name!r} - the blocks are {known}", (part, index))
        for name in self.blocks:
            if name not in self.layers:
                raise MisfitError("nothing names this block", ("blocks", name))
        if self.loop_loss and self.coda:
            raise MisfitError("the head can't read between a loop and a coda", ("loop_loss",))
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer's block, each layer once."""
        return (*self.prelude, *self.pattern, *self.coda)

    def build(self, dim: int, norm: Norm, matrices: torch.dtype = torch.float32) -> Recursive:
        """The module this section describes, its matrices stored in that type."""
        return Recursive(dim, self, norm, matrices)


class Recursive(nn.Module):
    """Blocks before, a pattern of blocks that is looped, and blocks after."""

    def __init__(
        self, dim: int, config: RecursiveConfig, norm: Norm, matrices: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.recomputes = False
        """Whether the backward pass computes each layer again instead of keeping its inside."""
        self.loops = config.loops
        self.loop_loss = config.loop_loss
        names = config.layers
        self.layers = nn.ModuleList()
        for i, name in enumerate(names):
            block = Block(dim, config.blocks[name], norm, layer_idx=i, num_layers=len(names))
            store(block, matrices)
            self.layers.append(block)
        first, last = len(config.prelude), len(config.prelude) + len(config.pattern)
        self._once = (range(first), range(first, last), range(last, len(names)))
        self.loop_norm = build_norm(norm, dim)
        self.inject_D = nn.Parameter(torch.ones(dim))
        self.keep_LD = nn.Parameter(torch.zeros(config.loops, dim))
        self.types = tuple(
            (config.blocks[name].mixer.type, config.blocks[name].ffn.type) for name in names
        )

    @property
    def own_parameters(self) -> int:
        """Parameters that belong to the loops, and to no layer."""
        own = (p for name, p in self.named_parameters() if not name.startswith("layers."))
        return sum(parameter.numel() for parameter in own)

    @property
    def passes(self) -> tuple[int, ...]:
        """The layer of every pass, first pass first."""
        before, looped, after = self._once
        return (*before, *(list(looped) * self.loops), *after)

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """The states of all passes: a layer has one in every loop."""
        blocks = [self.layers[i] for i in self.passes]
        return tuple(
            block.init_state(batch_size, device=device, dtype=dtype)
            for block in blocks
            if isinstance(block, Block)
        )

    def forward(
        self, x_BTD: Tensor, state: tuple[Any, ...], ctx: Ctx
    ) -> tuple[Tensor, tuple[Any, ...], Ctx]:
        """Runs every pass once."""
        before, looped, after = self._once
        left, done = list(state), list[Any]()

        def through(indices: range, x_BTD: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
            for i in indices:
                x_BTD, layer_state, ctx = self._run(self.layers[i], x_BTD, left.pop(0), ctx)
                done.append(layer_state)
            return x_BTD, ctx

        e_BTD, ctx = through(before, x_BTD, ctx)
        h_BTD = torch.zeros_like(e_BTD)
        for loop in range(self.loops):
            u_BTD = self.loop_norm(h_BTD + self.inject_D * e_BTD)
            y_BTD, ctx = through(looped, u_BTD, ctx)
            # a model that thinks longer than it was trained to goes on as it did last
            keep_D = self.keep_LD[min(loop, len(self.keep_LD) - 1)]
            h_BTD = y_BTD + keep_D * h_BTD
            if self.loop_loss and torch.is_grad_enabled() and loop < self.loops - 1:
                ctx = ctx._replace(between=(*ctx.between, h_BTD))
        y_BTD, ctx = through(after, h_BTD, ctx)
        return y_BTD, tuple(done), ctx

    def _run(self, layer: nn.Module, x_BTD: Tensor, state: Any, ctx: Ctx) -> Any:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(call, layer, x_BTD, state, ctx, use_reentrant=False)
        return call(layer, x_BTD, state, ctx)
