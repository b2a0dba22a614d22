"""Native steps of decoding (`csrc/decode_*.cpp`): their matrices, structures and functions.

A structure here mirrors the C structure of the same name, field by field; what it points to must
stay alive as long as it, so packed weights are kept in the step that owns the structure.

Shapes: R rows, C columns of a matrix, G groups of 16 rows, P pairs of columns.
"""

from __future__ import annotations

import ctypes
from typing import Literal, NamedTuple

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
        *((name, _int) for name in ("dim", "heads", "head_dim", "layer_has_residual")),
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


class Attention(ctypes.Structure):
    """Grouped-query attention."""

    _fields_ = [
        *((name, _int) for name in ("dim", "heads", "kv_heads", "head_dim", "turned")),
        ("norm_eps", _float),
        ("norm", Norm),
        *((name, Matrix) for name in ("query", "key", "value", "output")),
        *((name, _pointer) for name in ("query_norm", "key_norm", "frequency")),
    ]


class Cache(ctypes.Structure):
    """Keys and values that attention reads, and the place where it writes."""

    _fields_ = [
        *((name, _pointer) for name in ("k", "v", "segment")),
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


def rwkv_library() -> ctypes.CDLL:
    """Time mix and channel mix. Raises BuildError where they can't be had."""
    lib = build.library("decode_rwkv")
    _declare(lib, "time_mix", inputs=9)
    _declare(lib, "channel_mix", inputs=5)
    return lib


def layers_library() -> ctypes.CDLL:
    """Embedding, attention, SwiGLU and head. Raises BuildError where they can't be had."""
    lib = build.library("decode_layers")
    _declare(lib, "swiglu", inputs=3)
    _declare(lib, "head", inputs=3)
    _declare(lib, "attention", inputs=5)
    lib.attention_scratch.argtypes = [_pointer, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    lib.embed.restype = ctypes.c_int
    lib.embed.argtypes = [_pointer, _pointer, _pointer, _pointer, ctypes.c_int]
    return lib


def _declare(lib: ctypes.CDLL, name: str, *, inputs: int) -> None:
    """A step takes so many pointers, then scratch memory, rows and threads."""
    step, scratch = getattr(lib, name), getattr(lib, f"{name}_scratch")
    step.restype = None
    step.argtypes = [*[_pointer] * (inputs + 1), ctypes.c_int, ctypes.c_int]
    scratch.restype = ctypes.c_int64
    scratch.argtypes = [_pointer, ctypes.c_int, ctypes.c_int]
