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

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.nn.block import Block, BlockConfig, Norm, build_layers, build_norm, run_layer
from valkyrie_core.nn.halting import (
    ArgmaxConfig,
    Confidence,
    ConfidenceConfig,
    Halting,
    KLConfig,
    LatentConfig,
    Memory,
    Readout,
    Thought,
)
from valkyrie_core.nn.routed import RoutedConfig
from valkyrie_core.nn.selection import Selection, select
from valkyrie_core.nn.state import Ctx


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
    memory_tokens: int = Field(default=0, ge=0)
    """Empty tokens at the beginning of every document, before its text: room that all loops write
    into. They see no text, so nothing of it can be kept in them; they are registers."""
    loop_loss: float = Field(default=0.0, ge=0)
    """In training, the weight of the mean loss that the head has after the earlier loops."""
    halting: Halting | None = None
    """When a token is done; without it every token runs through all loops."""

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
        if self.halting is not None and self.halting.min_loops > self.loops:
            raise MisfitError(
                f"{self.halting.min_loops} are more than the {self.loops} loops that there are",
                ("halting", "min_loops"),
            )
        sends = isinstance(self.halting, ConfidenceConfig) and self.halting.then == "cheapest"
        routed = any(isinstance(self.blocks[x].mixer, RoutedConfig) for x in self.pattern)
        if sends and not routed:
            raise MisfitError(
                "no block of the pattern is routed: there is no cheapest mixer for sure tokens",
                ("halting", "then"),
            )
        if self.loop_loss and self.coda:
            raise MisfitError("the head can't read between a loop and a coda", ("loop_loss",))
        asks_head = isinstance(self.halting, KLConfig | ArgmaxConfig | ConfidenceConfig)
        if self.coda and asks_head:
            raise MisfitError("the head can't read between a loop and a coda", ("halting",))
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer's block, each layer once."""
        return (*self.prelude, *self.pattern, *self.coda)

    def build(self, dim: int, norm: Norm, matrices: torch.dtype = torch.float32) -> Recursive:
        """The module this section describes, its matrices stored in that type."""
        return Recursive(dim, self, norm, matrices)


class Thinking(NamedTuple):
    """Who thinks in the next loop."""

    active_BT: Tensor
    """The others are left out of it, or go through what is cheapest in it."""
    first_BT: Tensor
    """Tokens that start a document: they go on to the last loop."""
    loops_BT: Tensor
    """How many loops each token runs through, the next one included."""
    memory: Memory


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
        self.halts = False
        """Whether tokens that are done are left out of later loops. Training runs through all."""
        self.keeps_between = False
        """Whether what stands between loops is kept without gradients, too."""
        self.halting = None if config.halting is None else config.halting.build(dim)
        chosen = [config.blocks[name] for name in config.layers]
        self.layers = build_layers(dim, chosen, norm, matrices)
        self.types = tuple((block.mixer.type, block.ffn.type) for block in chosen)
        first, last = len(config.prelude), len(config.prelude) + len(config.pattern)
        self._once = (range(first), range(first, last), range(last, len(chosen)))
        self.loop_norm = build_norm(norm, dim)
        self.inject_D = nn.Parameter(torch.ones(dim))
        self.keep_LD = nn.Parameter(torch.zeros(config.loops, dim))

    @property
    def own_parameters(self) -> int:
        """Parameters that belong to the loops, and to no layer."""
        own = (p for name, p in self.named_parameters() if not name.startswith("layers."))
        return sum(parameter.numel() for parameter in own)

    def asks_head_too_early(self, rule: Config) -> bool:
        """Whether a rule would have the head read between a loop and a coda."""
        return bool(self._once[2]) and not isinstance(rule, LatentConfig)

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

    @property
    def sure_go_on(self) -> bool:
        """Whether tokens that are done go on through later loops, by what is cheapest there."""
        return isinstance(self.halting, Confidence) and self.halting.then == "cheapest"

    @property
    def reads_between(self) -> bool:
        """Whether training asks for what stands at tokens between loops."""
        return self.loop_loss > 0 or isinstance(self.halting, Confidence)

    def forward(
        self, x_BTD: Tensor, state: tuple[Any, ...], ctx: Ctx, readout: Readout
    ) -> tuple[Tensor, tuple[Any, ...], Ctx]:
        """Runs every pass once; with `halts`, over the tokens that are not done.

        Args:
            readout: what the head makes of tokens; for rules of halting that ask it.
        """
        before, looped, after = self._once
        left, done = list(state), list[Any]()

        def through(indices: range, x_BTD: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
            for i in indices:
                x_BTD, layer_state, ctx = run_layer(
                    self.layers[i], x_BTD, left.pop(0), ctx, recomputes=self.recomputes
                )
                done.append(layer_state)
            return x_BTD, ctx

        e_BTD, ctx = through(before, x_BTD, ctx)
        h_BTD = torch.zeros_like(e_BTD)
        thinking = self._begin(ctx, e_BTD)
        for loop in range(self.loops):
            chosen = None
            if thinking is not None and loop > 0 and not self.sure_go_on:
                chosen = select(thinking.active_BT)
            if chosen is not None and chosen.index_BK.shape[1] == 0:
                # nobody thinks any more: the states of later loops stay as they are
                done += left[: len(looped)]
                del left[: len(looped)]
                continue
            own, own_ctx = (h_BTD, e_BTD), ctx
            if thinking is not None and loop > 0 and self.sure_go_on:
                own_ctx = ctx._replace(sure_BT=~thinking.active_BT)
            if chosen is not None:
                own = (chosen.take(h_BTD), chosen.take(e_BTD))
                own_ctx = chosen.context(ctx)
            y_BTD, own_ctx = through(
                looped, self.loop_norm(own[0] + self.inject_D * own[1]), own_ctx
            )
            # a model that thinks longer than it was trained to goes on as it did last
            keep_D = self.keep_LD[min(loop, len(self.keep_LD) - 1)]
            new_BTD = y_BTD + keep_D * own[0]
            if thinking is not None and loop < self.loops - 1:
                thinking = self._halted(thinking, chosen, own[0], new_BTD, loop, readout)
            if chosen is None:
                h_BTD, ctx = new_BTD, own_ctx._replace(sure_BT=None)
            else:
                h_BTD = chosen.put(h_BTD, new_BTD)
                ctx = ctx._replace(aux=own_ctx.aux, routed=own_ctx.routed, routes=own_ctx.routes)
            trains = self.reads_between and torch.is_grad_enabled()
            if (trains or self.keeps_between) and loop < self.loops - 1:
                ctx = ctx._replace(between=(*ctx.between, h_BTD))
        if thinking is not None:
            ctx = ctx._replace(loops_BT=thinking.loops_BT)
        y_BTD, ctx = through(after, h_BTD, ctx)
        return y_BTD, tuple(done), ctx

    def _begin(self, ctx: Ctx, like: Tensor) -> Thinking | None:
        """Every token thinks at first; None where none ever halts."""
        if self.halting is None or not self.halts:
            return None
        active_BT = torch.ones_like(ctx.pos_BT, dtype=torch.bool)
        if ctx.valid_BT is not None:
            active_BT = ctx.valid_BT
        memory = self.halting.begin(active_BT.numel(), like)
        return Thinking(active_BT, ctx.first_BT, active_BT.long(), memory)

    def _halted(
        self,
        thinking: Thinking,
        chosen: Selection | None,
        before_BKD: Tensor,
        after_BKD: Tensor,
        loop: int,
        readout: Readout,
    ) -> Thinking:
        """Who goes on into the next loop."""
        assert self.halting is not None
        active_BT = thinking.active_BT
        places = chosen or select(active_BT)
        if chosen is None:
            before_BKD, after_BKD = places.take(before_BKD), places.take(after_BKD)
        rows_R, index_R = places.places()
        flat_R = rows_R * active_BT.shape[1] + index_R
        thought = Thought(before_BKD[places.real_BK], after_BKD[places.real_BK], readout)
        halted_R, kept = self.halting(thought, tuple(one[flat_R] for one in thinking.memory))
        memory = tuple(
            one.index_copy(0, flat_R, new) for one, new in zip(thinking.memory, kept, strict=True)
        )
        if loop + 1 < self.halting.min_loops:
            halted_R = torch.zeros_like(halted_R)
        halted_BT = torch.zeros_like(active_BT)
        halted_BT[rows_R, index_R] = halted_R
        # a document's first token tells the layers of every loop that it starts
        active_BT = active_BT & (~halted_BT | thinking.first_BT)
        return thinking._replace(
            active_BT=active_BT, loops_BT=thinking.loops_BT + active_BT, memory=memory
        )
