"""A recipe's blocks, laid in another order: the model of a layout.

Where the recipe lacks a kind of block, one is derived. All choices are said in `notes`.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from valkyrie_core.allocate.layout import ATTENTION, RECURRENT, Layout, brief
from valkyrie_core.allocate.match import Match, Matched, matched
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.attention import AttentionConfig
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import BlockConfig, StackConfig
from valkyrie_core.nn.canvas_core import CanvasConfig
from valkyrie_core.nn.ffn import SwiGLUConfig
from valkyrie_core.nn.rwkv import ChannelMixConfig, RWKV7Config

HEAD_DIM = 64
"""Width of a derived block's heads, where it divides the model's."""
NAMES = {RECURRENT: "rwkv", ATTENTION: "attn"}
"""What derived blocks are called, unless the recipe has other blocks of that name."""


class Design(NamedTuple):
    """A model with its layers rearranged."""

    model: ModelConfig
    layout: Layout
    notes: tuple[str, ...]
    """What was decided, derived and resized, a sentence each."""
    sizes: Matched | None
    """How it was brought to the size of the original; None where that was not asked for."""

    @property
    def pattern(self) -> str:
        """The names of the layers' blocks, as a pattern is written."""
        return brief(self.model.core.layers)


def kind_of(block: BlockConfig) -> str:
    """R or A: whether what a block remembers grows with the text.

    Raises UsageError for a block whose mixer is neither.
    """
    if not isinstance(block.mixer, AttentionConfig | RWKV7Config):
        raise UsageError(
            f"a block has the mixer {block.mixer.type}, neither attention nor rwkv7",
            hint="layers are allocated to plain mixers",
        )
    return ATTENTION if isinstance(block.mixer, AttentionConfig) else RECURRENT


def rearranged(
    model: ModelConfig, layout: Layout, *, match: Match | None = None, context_len: int = 512
) -> Design:
    """The model with its blocks in the order of a layout.

    Args:
        match: keep the original's parameters or FLOPs per token, by resizing all ffns.
        context_len: tokens over which FLOPs are averaged.

    Raises UsageError where the sizes can't be matched, or the model is a canvas.
    """
    if isinstance(model.core, CanvasConfig):
        raise UsageError(
            "a canvas's network is laid out in its recipe alone",
            hint="change model.core.pattern, and compare the two recipes",
        )
    blocks, notes = dict(model.core.blocks), list(layout.notes)
    chosen: dict[str, str] = {}
    for letter in (RECURRENT, ATTENTION):
        if letter in layout.layers:
            chosen[letter], note = _block_of_kind(model, letter, blocks)
            notes += [note] if note else []
    layers = tuple(chosen.get(name, name) for name in layout.layers)
    core = _stack(blocks, layers)
    if isinstance(model.core, StackConfig) and model.core.feedback is not None:
        kinds = {core.blocks[name].mixer.type for name in layers}
        if len(kinds) > 1:
            core = core.model_copy(update={"feedback": model.core.feedback})
        else:
            notes.append("feedback is left out: there are no layers of two kinds")
    changed = model.model_copy(update={"core": core})
    sizes = None
    if match is not None:
        changed, sizes = matched(changed, like=model, match=match, context_len=context_len)
        notes += sizes.notes
    return Design(changed, layout, tuple(notes), sizes)


def _stack(blocks: dict[str, BlockConfig], layers: tuple[str, ...]) -> StackConfig:
    """The stack of these layers, its pattern as short as it goes."""
    length = next(
        n
        for n in range(1, len(layers) + 1)
        if len(layers) % n == 0 and layers[:n] * (len(layers) // n) == layers
    )
    return StackConfig(
        # a block that no layer names is an error in a recipe
        blocks={name: block for name, block in blocks.items() if name in layers},
        pattern=layers[:length],
        repeat=len(layers) // length,
    )


def _block_of_kind(
    model: ModelConfig, letter: str, blocks: dict[str, BlockConfig]
) -> tuple[str, str | None]:
    """The name of the block that a letter means, put into `blocks` if it is new; and a note."""
    counts = Counter(model.core.layers)
    own = [name for name, block in model.core.blocks.items() if kind_of(block) == letter]
    if own:
        most = max(own, key=lambda name: counts[name])
        note = f"{letter} is {most}, which has most layers" if len(own) > 1 else None
        return most, note
    name = NAMES[letter]
    while name in blocks:
        name += "_new"
    blocks[name] = derived(letter, model.dim)
    mixer = blocks[name].mixer
    if isinstance(mixer, AttentionConfig):
        what = f"attention, {mixer.num_heads} heads of {model.dim // mixer.num_heads}, RoPE, swiglu"
    else:
        assert isinstance(mixer, RWKV7Config)
        what = f"rwkv7 with heads of {mixer.head_dim}, channel_mix"
    return name, f"the recipe has no such block, so {name} is derived: {what}"


def derived(letter: str, dim: int) -> BlockConfig:
    """A usual block of that kind, for a model of that width."""
    width = nearest_divisor(dim, HEAD_DIM)
    if letter == ATTENTION:
        mixer = AttentionConfig(num_heads=dim // width)
        return BlockConfig(mixer=mixer, ffn=SwiGLUConfig())
    return BlockConfig(mixer=RWKV7Config(head_dim=width), ffn=ChannelMixConfig())


def nearest_divisor(dim: int, wanted: int, *, least: int = 4) -> int:
    """The divisor of `dim` nearest to `wanted`, the even ones first; at least `least`."""
    divisors = [n for n in range(min(least, dim), dim + 1) if dim % n == 0]
    # rotary positions turn pairs of channels
    even = [n for n in divisors if n % 2 == 0] or divisors
    return min(even, key=lambda n: (abs(n - wanted), n))
