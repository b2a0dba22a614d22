"""Two latents that one network improves in turn: the core of an answer canvas.

    H times:  L times  z_L = f(z_L + z_H + x)
              once     z_H = f(z_H + z_L)

f(u) = norm(blocks(u)) is one network for both roles; z_H is what the answer is read from, z_L what
is thought about it, x the question. Gradients go through the last turn alone (Tiny Recursive
Models, Jolicoeur-Martineau 2025, arXiv 2510.04871; the two latents are those of HRM, 2506.21734).
Where that paper normalises after every mixer, blocks here are the pre-norm blocks of all cores, and
a norm stands at the end of f.

Positions see each other in both directions: a canvas is not causal, and no language model.

Shapes: B batch, M cells and the memory before them, D model.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.nn.block import Block, BlockConfig, Norm, build_layers, build_norm, run_layer
from valkyrie_core.nn.state import Ctx


class QHeadConfig(Config):
    """What says, after every step of supervision, whether the present answer is right.

    `q_halt`: it learns whether the answer is exactly right. `q_learning`: beside it another value
    learns what going on is worth, the better of both values one step later, which costs one more
    forward pass in training (HRM, arXiv 2506.21734).
    """

    type: Literal["q_halt", "q_learning"] = "q_halt"
    bias: float = -5.0
    """Of the logits, at first: nothing halts, as what begins shallow stays shallow."""
    weight: float = Field(default=0.5, gt=0)
    """Of its loss."""
    exploration: float = Field(default=0.1, ge=0, le=1)
    """In training, the share of questions that are thought about for a random number of steps at
    least, whatever the head says."""


class CanvasConfig(Config):
    """An answer canvas: all cells of an answer at once, better from step to step. Not causal."""

    type: Literal["canvas"] = "canvas"
    blocks: dict[str, BlockConfig] = Field(min_length=1)
    """Named blocks; of their attention, every cell sees all cells."""
    pattern: tuple[str, ...] = Field(min_length=1)
    """Names of the blocks of the network, first layer first."""
    cells: int = Field(ge=1)
    """The longest question or answer, its end included, in tokens."""
    h_cycles: int = Field(default=3, ge=1)
    """Turns of a step: how many times the answer is improved."""
    l_cycles: int = Field(default=3, ge=1)
    """How many times it is thought about before that."""
    gradient_cycles: int = Field(default=1, ge=0)
    """The last turns, through which gradients go; 0: through the last application of the network
    to either latent alone."""
    halt_max_steps: int = Field(default=8, ge=1)
    """Steps of supervision, at most; each begins where the last one ended."""
    memory_tokens: int = Field(default=8, ge=0)
    """Learned positions before the cells: room to think."""
    normalizer: Literal["stablemax", "softmax"] = "stablemax"
    """How logits become probabilities (stablemax: arXiv 2501.04697)."""
    halting: QHeadConfig = QHeadConfig()
    """When an answer is good enough."""

    @model_validator(mode="after")
    def _pattern_names_blocks(self) -> CanvasConfig:
        for index, name in enumerate(self.pattern):
            if name not in self.blocks:
                known = ", ".join(self.blocks)
                raise MisfitError(f"no block {name!r} - the blocks are {known}", ("pattern", index))
        for name, block in self.blocks.items():
            if name not in self.pattern:
                raise MisfitError("the pattern does not name this block", ("blocks", name))
            if block.mixer.type not in ("attention", "rwkv7"):
                raise MisfitError(
                    f"{block.mixer.type} looks back alone: a canvas sees all cells at once",
                    ("blocks", name, "mixer"),
                )
            if block.mixer.type == "attention" and block.mixer.window is not None:
                at = ("blocks", name, "mixer", "window")
                raise MisfitError("on a canvas every cell sees all cells: leave it out", at)
            if block.mixer.type == "attention" and block.mixer.position.type == "alibi":
                at = ("blocks", name, "mixer", "position")
                raise MisfitError("alibi looks back alone: take rope or none", at)
        if all(block.mixer.type != "attention" for block in self.blocks.values()):
            raise MisfitError(
                "some block needs attention: other mixers look back alone, and what says whether "
                "the answer is right stands first",
                ("pattern",),
            )
        if self.gradient_cycles > self.h_cycles:
            raise MisfitError(
                f"gradients can't go through more than the {self.h_cycles} h_cycles",
                ("gradient_cycles",),
            )
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of every layer's block."""
        return self.pattern

    def build(self, dim: int, norm: Norm, matrices: torch.dtype = torch.float32) -> CanvasCore:
        """The module this section describes, its matrices stored in that type."""
        return CanvasCore(dim, self, norm, matrices)


class Carry(NamedTuple):
    """What goes on from one step of supervision to the next."""

    z_H_BMD: Tensor
    z_L_BMD: Tensor


class CanvasCore(nn.Module):
    """One network that improves two latents."""

    H_init_D: Tensor
    L_init_D: Tensor

    def __init__(
        self, dim: int, config: CanvasConfig, norm: Norm, matrices: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.recomputes = False
        """Whether the backward pass computes each layer again instead of keeping its inside."""
        self.config = config
        chosen = [config.blocks[name] for name in config.layers]
        self.layers = build_layers(dim, chosen, norm, matrices)
        self.types = tuple((block.mixer.type, block.ffn.type) for block in chosen)
        self.out_norm = build_norm(norm, dim)
        for name in ("H_init_D", "L_init_D"):
            # drawn once and never trained, as in the paper
            self.register_buffer(name, torch.randn(dim).clamp(-2, 2))

    @property
    def own_parameters(self) -> int:
        """Parameters that belong to no layer."""
        own = (p for name, p in self.named_parameters() if not name.startswith("layers."))
        return sum(parameter.numel() for parameter in own)

    @property
    def passes(self) -> tuple[int, ...]:
        """The layer of every pass of a step, first pass first."""
        return tuple(range(len(self.layers))) * (self.config.h_cycles * (self.config.l_cycles + 1))

    @property
    def trained_passes(self) -> int:
        """The last ones, which gradients go through."""
        networks = self.config.gradient_cycles * (self.config.l_cycles + 1) or 2
        return networks * len(self.layers)

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """There is none: a canvas is read as a whole."""
        return ()

    def begin(self, batch_size: int, width: int) -> Carry:
        """The carry before the first step."""
        return Carry(
            self.H_init_D.expand(batch_size, width, -1), self.L_init_D.expand(batch_size, width, -1)
        )

    def forward(self, x_BMD: Tensor, carry: Carry, ctx: Ctx) -> tuple[Carry, Ctx]:
        """One step of supervision. Gradients stop at the carry.

        Args:
            x_BMD: the question.
        """
        z_H_BMD, z_L_BMD = carry
        H, L = self.config.h_cycles, self.config.l_cycles
        applied, without = 0, len(self.passes) - self.trained_passes
        for _ in range(H):
            for inner in range(L + 1):
                trains = applied >= without
                applied += len(self.layers)
                with nullcontext() if trains else torch.no_grad():
                    if inner < L:
                        z_L_BMD, ctx = self._improved(z_L_BMD + z_H_BMD + x_BMD, ctx, trains)
                    else:
                        z_H_BMD, ctx = self._improved(z_H_BMD + z_L_BMD, ctx, trains)
        return Carry(z_H_BMD, z_L_BMD), ctx

    def _improved(self, u_BMD: Tensor, ctx: Ctx, trains: bool) -> tuple[Tensor, Ctx]:
        aux = ctx.aux
        # the first layer's values are those of this application
        ctx = ctx._replace(v_first_BTD=None)
        for layer in self.layers:
            assert isinstance(layer, Block)
            state = layer.init_state(len(u_BMD), device=u_BMD.device, dtype=u_BMD.dtype)
            u_BMD, _, ctx = run_layer(layer, u_BMD, state, ctx, recomputes=self.recomputes)
        if not trains:
            ctx = ctx._replace(aux=aux)
        return self.out_norm(u_BMD), ctx
