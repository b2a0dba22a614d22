"""RMS norm per head and rotary positions in one native pass (`csrc/norm_rope.cpp`).

Shapes: B batch, T time, N heads, H head width, C half a head.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from valkyrie_core.kernels import build
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.build import kinds, pointer, pointers
from valkyrie_core.kernels.guard import expect, once_differentiable

WIDEST = 1024
"""The widest head that the native code takes."""
LANES = 16
"""Partial sums are padded to a multiple of the widest vector."""

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "norm_rope(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(  # type: ignore[no-untyped-call]
    "norm_rope_backward(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, float eps, Tensor dy) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def norm_rope_serves(x_BTNH: Tensor, weight_H: Tensor) -> bool:
    """Whether `norm_rope` takes these: on a CPU, fp32 or bf16, weights in fp32."""
    if x_BTNH.device.type != "cpu" or x_BTNH.dtype not in build.DTYPES:
        return False
    if weight_H.dtype != torch.float32 or x_BTNH.shape[-1] > WIDEST:
        return False
    return native_serves("norm_rope", "norms and rotary positions of attention run")


def norm_rope(
    x_BTNH: Tensor, weight_H: Tensor, cos_BTC: Tensor | None, sin_BTC: Tensor | None, eps: float
) -> Tensor:
    """RMS norm over H, then the rotation of first halves against second ones, computed in fp32.

    Args:
        x_BTNH: heads in fp32 or bf16, any strides but a dense H.
        weight_H: the gain of the norm, fp32.
        cos_BTC, sin_BTC: of every token's angles, fp32; None: no positions.
        eps: added to the mean square.

    Returns:
        [B, T, N, H], contiguous, in the type of x.
    """
    if cos_BTC is not None and sin_BTC is not None:
        cos_BTC, sin_BTC = cos_BTC.contiguous(), sin_BTC.contiguous()
    out: Tensor = _op(x_BTNH, weight_H, cos_BTC, sin_BTC, eps)
    return out


@torch.library.impl(_library, "norm_rope", "CPU")
def _forward(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    B, T, _, H = x.shape
    expect("weight", weight, (H,), torch.float32)
    expect("cos", cos, (B, T, H // 2), torch.float32)
    expect("sin", sin, (B, T, H // 2), torch.float32)
    y = torch.empty(x.shape, dtype=x.dtype)
    tensors = [_dense(x), y]
    _native().norm_rope_forward(
        pointers(tensors),
        kinds(tensors),
        _strides(tensors),
        weight.contiguous().data_ptr(),
        pointer(cos),
        pointer(sin),
        (ctypes.c_int64 * 4)(*x.shape),
        eps,
        torch.get_num_threads(),
    )
    return y


@torch.library.impl(_library, "norm_rope_backward", "CPU")
def _backward_native(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights."""
    B, T, _, H = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype)
    tensors = [*map(_dense, (x, dy)), dx]
    native = _native()
    step = -(-H // LANES) * LANES
    d_weights = torch.zeros(max(1, native.norm_rope_blocks(B * T)), step)
    native.norm_rope_backward(
        pointers(tensors),
        kinds(tensors),
        _strides(tensors),
        weight.contiguous().data_ptr(),
        pointer(cos),
        pointer(sin),
        d_weights.data_ptr(),
        step,
        (ctypes.c_int64 * 4)(*x.shape),
        eps,
        torch.get_num_threads(),
    )
    return dx, d_weights[0, :H].clone()


def _dense(x: Tensor) -> Tensor:
    """With its last dimension dense; the others may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (3 * len(tensors)))(*(s for x in tensors for s in x.stride()[:3]))


def _native() -> ctypes.CDLL:
    return _declare(build.library("norm_rope"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    lib.norm_rope_blocks.restype = size
    lib.norm_rope_blocks.argtypes = [size]
    lib.norm_rope_forward.restype = None
    lib.norm_rope_forward.argtypes = [*[pointer] * 7, real, integer]
    lib.norm_rope_backward.restype = None
    lib.norm_rope_backward.argtypes = [*[pointer] * 7, size, pointer, real, integer]
    return lib


@torch.library.register_fake("valkyrie::norm_rope", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("valkyrie::norm_rope_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, dy: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, cos, sin = ctx.saved_tensors
    dx, d_weight = _backward_op(x, weight, cos, sin, ctx.eps, dy.to(x.dtype))
    return dx, d_weight, None, None, None


torch.library.register_autograd(
    "valkyrie::norm_rope", _backward, setup_context=_setup, lib=_library
)
once_differentiable(_library, "valkyrie::norm_rope_backward")
_op = torch.ops.valkyrie.norm_rope.default
_backward_op = torch.ops.valkyrie.norm_rope_backward.default
