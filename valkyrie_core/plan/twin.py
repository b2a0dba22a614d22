"""From which length on a hybrid decodes cheaper than the same model made of attention alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from valkyrie_core.nn.attention import AttentionConfig
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import BlockConfig
from valkyrie_core.nn.ffn import SwiGLUConfig

LONGEST = 1 << 30
"""Contexts beyond it are not looked at."""
HEAD_DIM = 64
"""Width of a head where the recipe has no attention to take it from."""


class Twin(NamedTuple):
    """A model of full attention, and what it is made of."""

    config: ModelConfig
    replaced: int
    """Layers that are other ones than the recipe's."""
    description: str


def attention_twin(config: ModelConfig) -> Twin:
    """The model with full attention in every layer.

    Recurrent blocks become the recipe's first attention block; where it has none, attention with
    heads of 64 (or the nearest width that divides) and SwiGLU. Windows fall away everywhere.
    """
    core = config.core
    full = {
        name: block.model_copy(update={"mixer": block.mixer.model_copy(update={"window": None})})
        for name, block in core.blocks.items()
        if isinstance(block.mixer, AttentionConfig)
    }
    first = next((name for name in core.layers if name in full), None)
    if first is None:
        heads = _num_heads(config.dim)
        default = BlockConfig(mixer=AttentionConfig(num_heads=heads), ffn=SwiGLUConfig())
        width = config.dim // heads
        what = f"attention with {heads} heads of {width} and SwiGLU"
    else:
        default = full[first]
        what = f"the recipe's block {first!r} without a window"
    blocks = {name: full.get(name, default) for name in core.blocks}
    replaced = sum(blocks[name] != core.blocks[name] for name in core.layers)
    twin = config.model_copy(update={"core": core.model_copy(update={"blocks": blocks})})
    description = f"{replaced} of {len(core.layers)} layers replaced: {what}"
    return Twin(twin, replaced, description)


def _num_heads(dim: int) -> int:
    """So many heads that their width is as near to 64 as a divisor of the model's allows."""
    widths = [width for width in range(1, dim + 1) if dim % width == 0]
    return dim // min(widths, key=lambda width: (abs(math.log(width / HEAD_DIM)), -width))


def first_win(ours: Callable[[int], int], theirs: Callable[[int], int]) -> int | None:
    """The least length from which ours stays below theirs; None: not within LONGEST tokens.

    `theirs` must grow at least as fast as ours with every token, as full attention does: then the
    difference only grows, and halving finds the place.
    """
    if ours(LONGEST) >= theirs(LONGEST):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        if ours(middle) < theirs(middle):
            high = middle
        else:
            low = middle
    return high
