"""The layouts that a search compares, and their proxies: the same layers, narrower."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from valkyrie_core.allocate.design import kind_of, nearest_divisor, rearranged
from valkyrie_core.allocate.layout import ATTENTION, RECURRENT, Layout, brief, spread
from valkyrie_core.nn.attention import AttentionConfig
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import BlockConfig
from valkyrie_core.nn.rwkv import RWKV7Config

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of attention among the layers; an eighth only where there are eight layers."""
LEAST_HEAD = {RECURRENT: 16, ATTENTION: 32}
"""Proxies keep the number of heads, but none narrower: where rotary attention with heads of 32 had
learned recall, heads of 16 had not begun."""
SHORTEST_WINDOW = 8
"""Tokens that a window of a proxy has at least."""


class Candidate(NamedTuple):
    """One layout of a search."""

    name: str
    """A letter a layer: R recurrent, A attention, W attention with the recipe's window."""
    layers: tuple[str, ...]
    """R or A, first layer first."""
    window: int | None
    """What attention sees, in a context of the recipe's length; None: everything."""

    @property
    def is_baseline(self) -> bool:
        """Whether all layers are alike; baselines stay until the end of a search."""
        return self.window is None and len(set(self.layers)) == 1


def candidates(model: ModelConfig) -> list[Candidate]:
    """All recurrent, all attention, and between them ratios in a few placements.

    Attention is spread evenly, at the end or in the middle, and never in layer 0 but where all
    layers have it. Where the recipe names a window, the even layouts come with it as well.
    """
    num_layers = len(model.core.layers)
    window = _window(model)
    found: dict[str, Candidate] = {}
    for share in SHARES:
        count = round(num_layers * share)
        if share == 0.125 and num_layers < 8:
            continue
        rest = num_layers - count
        start = max(1, rest // 2)
        even = spread(num_layers, count)
        placements = [even, (RECURRENT,) * rest + (ATTENTION,) * count]
        if start + count <= num_layers:
            placements.append(
                (RECURRENT,) * start + (ATTENTION,) * count + (RECURRENT,) * (rest - start)
            )
        for layers in placements:
            _add(found, layers, None)
        if window is not None and count:
            _add(found, even, window)
    return list(found.values())


def _add(found: dict[str, Candidate], layers: tuple[str, ...], window: int | None) -> None:
    letters = tuple("W" if x == ATTENTION and window is not None else x for x in layers)
    name = brief(letters)
    pattern, _, times = name.partition(" x")
    name = pattern.replace(" ", "") + (f"x{times}" if len(letters) > 8 and times else "")
    if len(letters) <= 8:
        name = "".join(letters)
    found.setdefault(name, Candidate(name, layers, window))


def _window(model: ModelConfig) -> int | None:
    """The window of the attention block that has most layers."""
    layers = model.core.layers
    own = [name for name, block in model.core.blocks.items() if kind_of(block) == ATTENTION]
    if not own:
        return None
    mixer = model.core.blocks[max(own, key=layers.count)].mixer
    return mixer.window if isinstance(mixer, AttentionConfig) else None


def designed(model: ModelConfig, candidate: Candidate) -> ModelConfig:
    """The model in a candidate's layout, with the parameters of the original."""
    windowed = _with_blocks(model, lambda block: _see(block, candidate.window))
    changed = rearranged(windowed, Layout(candidate.layers, candidate.name), match="params")
    return changed.model


def _see(block: BlockConfig, window: int | None) -> BlockConfig:
    if not isinstance(block.mixer, AttentionConfig):
        return block
    return block.model_copy(update={"mixer": block.mixer.model_copy(update={"window": window})})


def narrowed(
    model: ModelConfig, width: int, *, vocab_size: int | None = None, shortened: float = 1.0
) -> ModelConfig:
    """The model at a smaller width: as many layers and, where they go, as many heads.

    Args:
        width: channels of the residual stream.
        vocab_size: another vocabulary; None: the model's.
        shortened: by how much contexts are shorter; windows shrink with them.
    """

    def narrow(block: BlockConfig) -> BlockConfig:
        kind_of(block)  # which a routed block has none of
        mixer, ffn = block.mixer, block.ffn
        changes: dict[str, int | None] = {}
        if isinstance(mixer, RWKV7Config):
            heads = model.dim // mixer.head_dim
            wanted = max(LEAST_HEAD[RECURRENT], width // heads)
            changes["head_dim"] = nearest_divisor(width, wanted)
            for rank in ("decay_rank", "rate_rank", "value_rank", "gate_rank"):
                if (own := getattr(mixer, rank)) is not None:
                    changes[rank] = max(4, round(own * width / model.dim))
        elif isinstance(mixer, AttentionConfig):
            wanted = max(LEAST_HEAD[ATTENTION], width // mixer.num_heads)
            heads = width // nearest_divisor(width, wanted)
            changes["num_heads"] = heads
            if mixer.num_kv_heads is not None:
                shared = heads * mixer.num_kv_heads // mixer.num_heads
                changes["num_kv_heads"] = shared if shared and heads % shared == 0 else 1
            if mixer.window is not None:
                changes["window"] = max(SHORTEST_WINDOW, round(mixer.window * shortened))
        if ffn.hidden_dim is not None:
            hidden = max(8, round(ffn.hidden_dim * width / model.dim / 8) * 8)
            ffn = ffn.resized(hidden)
        return block.model_copy(update={"mixer": mixer.model_copy(update=changes), "ffn": ffn})

    if width >= model.dim:
        width = model.dim
    small = _with_blocks(model, narrow)
    return ModelConfig.model_validate(
        {**small.model_dump(), "dim": width, "vocab_size": vocab_size or model.vocab_size}
    )


def _with_blocks(model: ModelConfig, change: Callable[[BlockConfig], BlockConfig]) -> ModelConfig:
    blocks = {name: change(block) for name, block in model.core.blocks.items()}
    core = model.core.model_copy(update={"blocks": blocks})
    return model.model_copy(update={"core": core})
