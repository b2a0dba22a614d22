"""Native steps of decoding (`csrc/decode_*.cpp`): their matrices, structures and functions.

A structure here mirrors the C structure of the same name, field by field; what it points to must
stay alive as long as it, so packed weights are kept in the step that owns the structure.

Shapes: R rows, C columns of a matrix, G groups of 16 rows, P pairs of columns.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from valkyrie_core.kernels import build
from valkyrie_core.kernels.arena import Arena

GROUP = 16
"""Rows that are computed together."""
MAX_BATCH = 8
"""Rows of activations that a step takes at most."""
Format = Literal["fp32", "bf16", "int8"]
KINDS: dict[Format, int] = {"fp32": 0, "bf16": 1, "int8": 2}

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Matrix(ctypes.Structure):
    """A packed matrix; all zeros where there is none."""

    _fields_ = [
        ("data", _pointer),
        ("scale", _pointer),
        ("rows", _int),
        ("columns", _int),
        ("kind", _int),
    ]


class Norm(ctypes.Structure):
    """Layer norm, or RMS norm where bias is null."""

    _fields_ = [("weight", _pointer), ("bias", _pointer), ("eps", _float)]


class TimeMix(ctypes.Structure):
    """RWKV-7's time mix."""

    _fields_ = [
        *((name, _int) for name in ("dim", "heads", "head_dim")),
        *((name, _int) for name in ("layer_has_residual", "is_signed")),
        ("norm", Norm),
        ("mix", _pointer * 6),
        *((name, Matrix) for name in ("receptance", "key", "value", "output")),
        *((name, Matrix) for name in ("w1", "a1", "v1", "g1", "w2", "a2", "v2", "g2")),
        *((name, _pointer) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k", "gain", "bias")),
    ]


class ChannelMix(ctypes.Structure):
    """RWKV-7's channel mix."""

    _fields_ = [
        ("dim", _int),
        ("hidden", _int),
        ("norm", Norm),
        ("mix", _pointer),
        ("key", Matrix),
        ("value", Matrix),
    ]


class SwiGLU(ctypes.Structure):
    """SwiGLU."""

    _fields_ = [
        ("dim", _int),
        ("hidden", _int),
        ("norm", Norm),
        *((name, Matrix) for name in ("gate", "up", "down")),
    ]


class MoE(ctypes.Structure):
    """A mixture of SwiGLUs."""

    _fields_ = [
        *((name, _int) for name in ("dim", "hidden", "experts", "slots", "gate", "normalized")),
        *((name, _float) for name in ("scale", "mass")),
        *((name, _int) for name in ("groups", "top_groups", "shared_hidden")),
        ("norm", Norm),
        *((name, _pointer) for name in ("router", "confidence", "bias", "gates", "ups", "downs")),
        *((name, Matrix) for name in ("shared_gate", "shared_up", "shared_down")),
    ]


class Attention(ctypes.Structure):
    """Grouped-query attention."""

    _fields_ = [
        *((name, _int) for name in ("dim", "heads", "kv_heads", "head_dim", "turned")),
        ("norm_eps", _float),
        ("norm", Norm),
        *((name, Matrix) for name in ("query", "key", "value", "output")),
        *((name, _pointer) for name in ("query_norm", "key_norm", "frequency")),
        ("turn_scale", _float),
        *((name, _int) for name in ("window", "sinks")),
        ("slopes", _pointer),
    ]


class Cache(ctypes.Structure):
    """Keys and values that attention reads, and the place where it writes."""

    _fields_ = [
        *((name, _pointer) for name in ("k", "v", "segment", "position")),
        ("length", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("bf16", _int),
    ]


class Embedding(ctypes.Structure):
    """The embedding and the norm after it."""

    _fields_ = [("dim", _int), ("vocab", _int), ("norm", Norm), ("table", _pointer)]


class Head(ctypes.Structure):
    """The norm before the output layer, and the layer."""

    _fields_ = [("dim", _int), ("norm", Norm), ("matrix", Matrix)]


class Packed(NamedTuple):
    """A matrix as a structure, and the memory it points to."""

    matrix: Matrix
    memory: tuple[Tensor, ...]


def pack(weight_RC: Tensor, form: Format, arena: Arena) -> Packed:
    """A matrix laid out as `csrc/matvec.h` reads it, in memory of the arena."""
    R, C = weight_RC.shape
    weight_RC = weight_RC.detach().float()
    scales: tuple[Tensor, ...] = ()
    if form == "int8":
        weight_RC, scale_R = quantise(weight_RC)
        scales = (F.pad(scale_R, (0, -R % GROUP)).contiguous(),)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[form]
    width = 1 if form == "fp32" else 2
    weight_RC = F.pad(weight_RC.to(dtype), (0, -C % width, 0, -R % GROUP))
    data_GPRW = weight_RC.view(-1, GROUP, (C + width - 1) // width, width).transpose(1, 2)
    data = arena.place(data_GPRW)
    matrix = Matrix(data.data_ptr(), scales[0].data_ptr() if scales else None, R, C, KINDS[form])
    return Packed(matrix, (data, *scales))


def quantise(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers between -127 and 127, and one fp32 scale per row: weight = number * scale."""
    scale_R = weight_RC.abs().amax(dim=1) / 127
    numbers_RC = (weight_RC / scale_R.clamp(min=1e-30)[:, None]).round()
    return numbers_RC.clamp(-127, 127).to(torch.int8), scale_R


def rounded(weight_RC: Tensor, form: Format) -> Tensor:
    """The fp32 values that a matrix has in a format."""
    weight_RC = weight_RC.detach().float()
    if form == "int8":
        numbers_RC, scale_R = quantise(weight_RC)
        return numbers_RC * scale_R[:, None]
    return weight_RC.bfloat16().float() if form == "bf16" else weight_RC


POINTERS = 8
"""Pointers of one call."""
_NOTHING = (0,) * POINTERS


class Queue:
    """Steps of one token that wait to be run in one go, in their order.

    Python between two native calls would find the caches full of weights and the memory idle. What
    the steps write is not there before `run`.
    """

    def __init__(self, B: int) -> None:
        self.B = B
        self.threads = torch.get_num_threads()
        self._words: list[int] = []
        self._kept: list[object] = []
        self._size = 0

    def add(self, step: int, of: int, pointers: tuple[int, ...], size: int, *kept: object) -> None:
        """Appends a call.

        Args:
            step: the address of the native step.
            of: the address of its structure.
            pointers: what it reads and writes; 0 for what there is not.
            size: bytes of scratch memory.
            kept: what the pointers point to; stays alive until the run.
        """
        self._words += (step, of, *pointers, *_NOTHING[len(pointers) :])
        self._kept.append(kept)
        self._size = max(self._size, size)

    def run(self) -> None:
        """Runs what waits."""
        if not self._words:
            return
        calls = (ctypes.c_int64 * len(self._words))(*self._words)
        count = len(self._words) // (2 + POINTERS)
        memory = torch.empty(self._size, dtype=torch.uint8)
        layers_library().run(calls, count, memory.data_ptr(), self.B, self.threads)
        self._words, self._kept, self._size = [], [], 0


def address(function: Any) -> int:
    """Where a native function lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def rwkv_library() -> ctypes.CDLL:
    """Time mix and channel mix. Raises BuildError where they can't be had."""
    lib = build.library("decode_rwkv")
    for name in ("time_mix", "channel_mix"):
        _declare_scratch(lib, name)
    return lib


def moe_library() -> ctypes.CDLL:
    """Mixtures of experts. Raises BuildError where they can't be had."""
    lib = build.library("decode_moe")
    _declare_scratch(lib, "moe")
    return lib


def layers_library() -> ctypes.CDLL:
    """Embedding, attention, SwiGLU, head and `run`. Raises BuildError where they can't be had."""
    lib = build.library("decode_layers")
    if not lib.embed.argtypes:
        for name in ("swiglu", "head"):
            _declare_scratch(lib, name)
        lib.attention_scratch.restype = ctypes.c_int64
        lib.attention_scratch.argtypes = [_pointer, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        lib.run.restype = None
        lib.run.argtypes = [_pointer, ctypes.c_int, _pointer, ctypes.c_int, ctypes.c_int]
        lib.embed.restype = ctypes.c_int
        lib.embed.argtypes = [_pointer, _pointer, _pointer, _pointer, ctypes.c_int]
    return lib


def _declare_scratch(lib: ctypes.CDLL, name: str) -> None:
    scratch = getattr(lib, f"{name}_scratch")
    scratch.restype = ctypes.c_int64
    scratch.argtypes = [_pointer, ctypes.c_int, ctypes.c_int]
