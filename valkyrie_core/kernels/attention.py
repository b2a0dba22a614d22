"""Causal attention in bf16 on a CPU (`csrc/attention.cpp`), as torch operators.

Shapes: B batch, T time, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from valkyrie_core.kernels import build
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.build import pointer, pointers
from valkyrie_core.kernels.guard import expect, once_differentiable

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attention(Tensor q, Tensor k, Tensor v, Tensor? segment) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(  # type: ignore[no-untyped-call]
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? segment, Tensor y, Tensor lse, "
    "Tensor dy) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def blocked_serves(q_BTNH: Tensor) -> bool:
    """Whether `blocked_attention` takes queries like these: bf16, on a CPU, with native code."""
    if q_BTNH.device.type != "cpu" or q_BTNH.dtype != torch.bfloat16:
        return False
    return native_serves("attention", "attention in bf16 runs")


def blocked_attention(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, segment_BT: Tensor | None = None
) -> Tensor:
    """Causal softmax attention scaled by 1 / sqrt(H), in memory that grows with T, not its square.

    Args:
        q_BTNH: queries, bf16.
        k_BTKH, v_BTKH: keys and values, bf16; K divides N, and a head serves N / K queries' heads.
        segment_BT: tokens see each other only where this is equal; a negative one is padding and
            sees itself alone. None: one segment.

    Returns:
        [B, T, N, H] in bf16.
    """
    if segment_BT is not None:
        # to the kernel, each padding is a segment of its own
        lone_T = -1 - torch.arange(segment_BT.shape[1], device=segment_BT.device)
        segment_BT = torch.where(segment_BT < 0, lone_T, segment_BT).int().contiguous()
    out: tuple[Tensor, Tensor] = _op(q_BTNH, k_BTKH, v_BTKH, segment_BT)
    return out[0]


@torch.library.impl(_library, "attention", "CPU")
def _forward(q: Tensor, k: Tensor, v: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    """y, and per query the logarithm of the sum of exponentials, [B, N, T]."""
    B, T, N, H = q.shape
    K = k.shape[2]
    if K == 0 or N % K:
        raise ValueError(f"{K} key heads don't divide {N} query heads")
    for name, tensor in (("k", k), ("v", v)):
        expect(name, tensor, (B, T, K, H), torch.bfloat16)
    expect("segment", segment, (B, T), torch.int32)
    y = torch.empty(B, T, N, H, dtype=torch.bfloat16)
    lse = torch.empty(B, N, T)
    if q.numel() == 0:
        return y, lse
    tensors = [*map(_dense, (q, k, v)), y]
    sizes = _sizes(q, k)
    native, threads = _native(), torch.get_num_threads()
    bytes_forward, _, _ = _memory(sizes)
    memory = torch.empty(threads * bytes_forward, dtype=torch.uint8)
    native.attention_forward(
        pointers(tensors),
        _strides(tensors),
        lse.data_ptr(),
        pointer(segment),
        sizes,
        memory.data_ptr(),
        *(has_amx(), threads),
    )
    return y, lse


@torch.library.impl(_library, "attention_backward", "CPU")
def _backward_native(
    q: Tensor, k: Tensor, v: Tensor, segment: Tensor | None, y: Tensor, lse: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    grads = [torch.empty(x.shape, dtype=torch.bfloat16) for x in (q, k, v)]
    if q.numel() == 0:
        return grads[0], grads[1], grads[2]
    tensors = [*map(_dense, (q, k, v, y, dy)), *grads]
    sizes = _sizes(q, k)
    native, threads = _native(), torch.get_num_threads()
    _, bytes_backward, floats_shared = _memory(sizes)
    memory = torch.empty(threads * bytes_backward, dtype=torch.uint8)
    shared = torch.empty(floats_shared)
    native.attention_backward(
        pointers(tensors),
        _strides(tensors),
        lse.data_ptr(),
        pointer(segment),
        sizes,
        memory.data_ptr(),
        shared.data_ptr(),
        *(has_amx(), threads),
    )
    return grads[0], grads[1], grads[2]


def _dense(x: Tensor) -> Tensor:
    """With its last dimension dense; the others may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q_BTNH: Tensor, k_BTKH: Tensor) -> ctypes.Array[ctypes.c_int64]:
    B, T, N, H = q_BTNH.shape
    return (ctypes.c_int64 * 5)(B, T, N, k_BTKH.shape[2], H)


def _strides(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (3 * len(tensors)))(*(s for x in tensors for s in x.stride()[:3]))


def _memory(sizes: ctypes.Array[ctypes.c_int64]) -> tuple[int, int, int]:
    """Bytes per thread forward and backward, and floats that the backward pass shares."""
    found = [ctypes.c_int64() for _ in range(3)]
    _native().attention_memory(sizes, *map(ctypes.byref, found))
    return found[0].value, found[1].value, found[2].value


@functools.cache
def has_amx() -> bool:
    """Whether products run on the processor's matrix unit."""
    return bool(_native().attention_has_amx())


def _native() -> ctypes.CDLL:
    return _declare(build.library("attention"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    lib.attention_has_amx.restype = integer
    lib.attention_memory.restype = None
    lib.attention_memory.argtypes = [pointer] * 4
    lib.attention_forward.restype = None
    lib.attention_forward.argtypes = [*[pointer] * 6, integer, integer]
    lib.attention_backward.restype = None
    lib.attention_backward.argtypes = [*[pointer] * 7, integer, integer]
    return lib


@torch.library.register_fake("valkyrie::attention", lib=_library)  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, N, _ = q.shape
    return q.new_empty(q.shape), q.new_empty([B, N, T], dtype=torch.float32)


@torch.library.register_fake("valkyrie::attention_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, segment: Tensor | None, y: Tensor, lse: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segment = inputs
    ctx.save_for_backward(q, k, v, segment, *output)


def _backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    q, k, v, segment, y, lse = ctx.saved_tensors
    return (*_backward_op(q, k, v, segment, y, lse, dy.to(torch.bfloat16)), None)


torch.library.register_autograd(
    "valkyrie::attention", _backward, setup_context=_setup, lib=_library
)
once_differentiable(_library, "valkyrie::attention_backward")
_op = torch.ops.valkyrie.attention.default
_backward_op = torch.ops.valkyrie.attention_backward.default


# what is computed: keys that a token may see (torch counts the others of its own attention as
# well); backward, five products for two
@register_flop_formula(torch.ops.valkyrie.attention)
def _forward_flops(q_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    B, T, N, H = q_shape
    return 2 * 2 * B * N * (T * (T + 1) // 2) * H


@register_flop_formula(torch.ops.valkyrie.attention_backward)
def _backward_flops(q_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    B, T, N, H = q_shape
    return 5 * 2 * B * N * (T * (T + 1) // 2) * H
