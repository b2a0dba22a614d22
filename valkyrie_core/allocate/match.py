"""Two models of one size: ffns are resized until parameters or FLOPs per token agree.

Both are linear in the width of an ffn, so that one factor for all of them follows from two
countings. Models are built without weights, on torch's meta device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from valkyrie_core.errors import UsageError
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import Block, BlockConfig
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.routers import foreseen
from valkyrie_core.plan.flops import training_flops
from valkyrie_core.plan.parameters import weightless

Match = Literal["params", "flops"]
MULTIPLES = (32, 8, 1)
"""Widths are multiples of the first of these that comes near enough."""
NEAR = 0.005
"""A difference that is near enough, as a share of the original."""


class Matched(NamedTuple):
    """How a model was brought to the size of another one."""

    match: Match
    wanted: int
    """The original's parameters, or training FLOPs per token."""
    before: int
    """The changed model's, before it was resized."""
    after: int
    """And after."""
    widths: dict[str, tuple[int, int]]
    """The ffn's hidden width by block, before and after."""

    @property
    def difference(self) -> float:
        """What remains, as a share of the original: positive where the new model is larger."""
        return self.after / self.wanted - 1

    @property
    def notes(self) -> list[str]:
        """What was done, for people."""
        what = {"params": "parameters", "flops": "training FLOPs per token"}[self.match]
        widths = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.widths.items())
        return [
            f"ffn hidden_dim resized: {widths}; {what} {self.before:,} -> {self.after:,}, the "
            f"original has {self.wanted:,} ({self.difference:+.2%})"
        ]


def layers_of(model: Model) -> list[Block]:
    """The blocks of a model, first layer first."""
    return [layer for layer in model.core.layers if isinstance(layer, Block)]


def size_of(model: Model, match: Match, context_len: int) -> int:
    """Parameters, or training FLOPs per token."""
    if match == "params":
        return model.num_parameters()
    return sum(training_flops(foreseen(model), context_len).values())


def matched(
    model: ModelConfig, *, like: ModelConfig, match: Match, context_len: int
) -> tuple[ModelConfig, Matched]:
    """The model with its ffns resized to the size of another one.

    Raises UsageError where the mixers alone are larger than that.
    """

    def size(config: ModelConfig) -> int:
        return size_of(weightless(config), match, context_len)

    wanted, before = size(like), size(model)
    widths = _widths(model)
    # the size of all ffns together: what one that is twice as wide adds
    ffns = size(_with_widths(model, {name: 2 * width for name, width in widths.items()})) - before
    factor = 1 + (wanted - before) / ffns
    best: tuple[ModelConfig, Matched] | None = None
    for multiple in MULTIPLES:
        new = {name: round(width * factor / multiple) * multiple for name, width in widths.items()}
        if min(new.values()) < multiple:
            continue
        resized = _with_widths(model, new) if new != widths else model
        found = Matched(
            match, wanted, before, size(resized), {n: (widths[n], new[n]) for n in widths}
        )
        if best is None or abs(found.difference) < abs(best[1].difference):
            best = resized, found
        if abs(found.difference) < NEAR:
            break
    if best is None:
        raise UsageError(
            f"without any ffn the layers are larger than the original ({wanted:,} {match})",
            hint="leave --match out, or take another layout",
        )
    return best


def _widths(config: ModelConfig) -> dict[str, int]:
    """The hidden width of every block's ffn, those that the recipe leaves out as well."""
    # the last layer of a block: experts may have dense layers before them
    layers = dict(zip(config.core.layers, layers_of(weightless(config)), strict=True))
    return {name: int(layers[name].ffn.hidden_dim) for name in config.core.blocks}


def _with_widths(config: ModelConfig, widths: dict[str, int]) -> ModelConfig:
    def resized(name: str, block: BlockConfig) -> BlockConfig:
        return block.model_copy(update={"ffn": block.ffn.resized(widths[name])})

    blocks = {name: resized(name, block) for name, block in config.core.blocks.items()}
    core = config.core.model_copy(update={"blocks": blocks})
    return config.model_copy(update={"core": core})
