"""How a state is kept between two readings: as it was computed, in fewer bits, or cut to a window.

What is kept is smaller; what is computed from it is as wide as ever. What every rounding costs is
measured by `valkyrie eval --long-context`.

Shapes: B batch, N heads, S keys, H head width, D model.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from valkyrie_core.config import Config
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.attention import Attention
from valkyrie_core.nn.kv_cache import HighWater, KVState
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.routed import RoutedMixer
from valkyrie_core.nn.rwkv import TimeMixState
from valkyrie_core.nn.state import LMState, num_bytes
from valkyrie_core.nn.structure import Structure

LARGEST = 127
SINKS = 4


class StateFormat(Config):
    """What is kept of a state, and in which numbers."""

    kv_window: int | None = Field(default=None, ge=1)
    """Attention sees only so many last tokens and the first four; None: as the model was built."""
    kv_dtype: Literal["computed", "int8"] = "computed"
    """Of keys and values; int8 has one scale per token and head."""
    state_dtype: Literal["computed", "bf16", "int8"] = "computed"
    """Of recurrent states; int8 has one scale per row of a head's matrix."""

    @property
    def rounds(self) -> bool:
        """Whether numbers are kept in fewer bits."""
        return self.kv_dtype != "computed" or self.state_dtype != "computed"

    @property
    def changes_nothing(self) -> bool:
        """Whether a state is kept as it was computed."""
        return not self.rounds and self.kv_window is None


class Packed(NamedTuple):
    """A tensor in fewer bits."""

    values: Tensor
    scale: Tensor | None
    """int8 values times this, by broadcasting; None: the values themselves."""
    dtype: torch.dtype
    """What it was."""


class PackedCache(NamedTuple):
    """A KV cache in fewer bits, without room for more."""

    k: Packed
    v: Packed
    segment_BS: Tensor
    pos_BS: Tensor
    length: int


class PackedTimeMix(NamedTuple):
    """The state of a time mix in fewer bits."""

    shift: Packed
    wkv: Packed


def pack(state: LMState, format: StateFormat) -> LMState:
    """The state as it is kept; `num_bytes` counts it, `unpack` makes it usable again."""
    if not format.rounds:
        return state
    layers = tuple(
        tuple(_pack_part(part, format) for part in layer_state) for layer_state in state.layers
    )
    return state._replace(layers=layers)


def unpack(state: LMState) -> LMState:
    """The state that a model goes on from."""
    layers = tuple(tuple(_unpack_part(part) for part in layer) for layer in state.layers)
    return state._replace(layers=layers)


def _pack_part(part: Any, format: StateFormat) -> Any:
    if isinstance(part, KVState):
        if format.kv_dtype == "computed":
            return part
        L = part.length
        return PackedCache(
            _to_int8(part.k_BKSH[:, :, :L]),
            _to_int8(part.v_BKSH[:, :, :L]),
            part.segment_BS[:, :L].clone(),
            part.pos_BS[:, :L].clone(),
            L,
        )
    if _is_several(part):
        return tuple(_pack_part(one, format) for one in part)
    if format.state_dtype == "computed":
        return part
    if isinstance(part, TimeMixState):
        matrix = _to_int8 if format.state_dtype == "int8" else _to_bf16
        return PackedTimeMix(_to_bf16(part.shift_BD), matrix(part.wkv_BNHH))
    # the last token of a channel mixer: a vector, of which rounding to a scale would save nothing
    rounds = isinstance(part, Tensor) and part.is_floating_point()
    # a count of tokens is no number to be rounded
    return _to_bf16(part) if rounds else part


def _unpack_part(part: Any) -> Any:
    if isinstance(part, Packed):
        return _wide(part)
    if isinstance(part, PackedTimeMix):
        return TimeMixState(_wide(part.shift), _wide(part.wkv))
    if isinstance(part, PackedCache):
        k, v, segment_BS, pos_BS, length = part
        return KVState(_wide(k), _wide(v), segment_BS, pos_BS, length, HighWater(length))
    return tuple(map(_unpack_part, part)) if _is_several(part) else part


def _is_several(part: Any) -> bool:
    """Whether a mixer has several states, as experts do that are asked in rounds."""
    return isinstance(part, tuple) and not hasattr(part, "_fields")


def _wide(packed: Packed) -> Tensor:
    values = packed.values.to(packed.dtype)
    return values if packed.scale is None else values * packed.scale


def _to_int8(x: Tensor) -> Packed:
    scale = x.abs().amax(dim=-1, keepdim=True) / LARGEST
    # a row of zeros has no scale
    values = (x / scale.clamp(min=torch.finfo(x.dtype).tiny)).round().to(torch.int8)
    return Packed(values, scale, x.dtype)


def _to_bf16(x: Tensor) -> Packed:
    return Packed(x.to(torch.bfloat16), None, x.dtype)


def settle(model: HybridLM, state: LMState) -> LMState:
    """The state without keys that no later token sees: what is kept of it, in memory or a file."""
    layers = []
    for block, (mixer_state, ffn_state) in zip(model.blocks(), state.layers, strict=True):
        if isinstance(block.mixer, Attention | RoutedMixer):
            mixer_state = block.mixer.settled(mixer_state, state.segment_B, state.pos_B)
        layers.append((mixer_state, ffn_state))
    return state._replace(layers=tuple(layers))


def kept_bytes(state: LMState) -> int:
    """Bytes of a state that is kept by itself: without the spare room of its caches."""

    def size(part: Any) -> int:
        if isinstance(part, KVState):
            return num_bytes(kv_cache.stored(part))
        if isinstance(part, Tensor):
            return num_bytes(part)
        return sum(map(size, part)) if isinstance(part, tuple) else 0

    return size(state)


def limit_windows(model: HybridLM, window: int) -> int:
    """Lets attention see so many last tokens only, in place; how many layers that changed."""
    return sum(layer.limit(window, SINKS) for layer in attention_layers(model))


def stretch_positions(model: HybridLM, factor: float, trained_context: int) -> int:
    """Stretches rotary positions by YaRN, in place; how many layers that changed."""
    return sum(layer.stretch(factor, trained_context) for layer in attention_layers(model))


def attention_layers(model: HybridLM) -> list[Attention]:
    """What attends to tokens, first layer first; messages between chunks are not among them."""
    modules = list(model.modules())
    of_chunks = {part for one in modules if isinstance(one, Structure) for part in one.each}
    return [one for one in modules if isinstance(one, Attention) and one not in of_chunks]
