"""RWKV-7's time mix between its matrices: gates, keys, the recurrence, group norm, read-out.

One native pass each way (`csrc/time_mix.cpp`): what surrounds the recurrence is elementwise and
costs, as PyTorch operations, several times what the recurrence does.

Shapes: B batch, T time, D model, N heads, H head width.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from valkyrie_core.kernels import build, native_serves_width, wkv7
from valkyrie_core.kernels.guard import expect, once_differentiable
from valkyrie_core.kernels.wkv import flags
from valkyrie_core.kernels.wkv_op import (
    BACKWARD_FLOPS_PER_STATE_ELEMENT,
    FLOPS_PER_STATE_ELEMENT,
    STRETCH,
)

DECAY_SCALE = math.exp(-0.5)
"""log_decay = -exp(-0.5) * sigmoid(w): between -0.6066 and 0."""
GROUP_NORM_EPS = 64e-5


class Rows(NamedTuple):
    """What the matrices made of a window, [B, T, D] each and of one type."""

    r: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    """Added to w0."""
    rate: Tensor
    """Added to a0."""
    share: Tensor | None
    """Added to v0; None in the first layer, whose values are the first."""
    v_first: Tensor | None
    """The first layer's values; None there."""
    gate: Tensor


class Vectors(NamedTuple):
    """The layer's parameters, [D] each; names as in the author's checkpoints."""

    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    ln_x_weight: Tensor
    ln_x_bias: Tensor


def time_mix(
    rows: Rows, vectors: Vectors, state: Tensor, doc_BT: Tensor | None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """From the matrices' outputs to the input of the last matrix.

    Args:
        state: [B, N, H, H] as [value, key]; its shape says how wide a head is.
        doc_BT: as in `wkv7`.
        signed: lets the rate reach 1 + decay instead of 1, so that the transition's smallest
            eigenvalue reaches -1 instead of the decay less 1.

    Returns:
        [B, T, D] in the type of the rows, and the state after the last token.
    """
    head_dim = state.shape[-1]
    if not _native_serves(rows.r, head_dim):
        return time_mix_naive(rows, vectors, state, doc_BT, signed=signed)
    dtype = rows.r.dtype
    same = [None if x is None else x.to(dtype).contiguous() for x in rows]
    flat = [None if x is None else x.float().flatten() for x in vectors]
    flags_BT = None if doc_BT is None else flags(doc_BT, rows.r)
    save = torch.is_grad_enabled()
    z, final, *_ = _op(*same, *flat, state.float().contiguous(), flags_BT, head_dim, signed, save)
    return z, final


def time_mix_naive(
    rows: Rows, vectors: Vectors, state: Tensor, doc_BT: Tensor | None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch operations, with whichever WKV-7 there is."""
    B, T, D = rows.r.shape
    N, H = state.shape[1], state.shape[-1]

    def heads(x_BTD: Tensor) -> Tensor:
        return x_BTD.view(B, T, N, H)

    k, v = rows.k, rows.v
    log_decay = -DECAY_SCALE * torch.sigmoid(vectors.w0 + rows.decay)
    rate = torch.sigmoid(vectors.a0 + rows.rate)
    if rows.share is not None and rows.v_first is not None and vectors.v0 is not None:
        v = v + (rows.v_first - v) * torch.sigmoid(vectors.v0 + rows.share)
    kk = F.normalize(heads(k * vectors.k_k), dim=-1)
    k = k * (1 + (rate - 1) * vectors.k_a)
    if signed:
        rate = rate * (1 + log_decay.exp())
    r, log_decay, k, v, rate = (heads(x) for x in (rows.r, log_decay, k, v, rate))
    y, state = wkv7(r, log_decay, k, v, -kk, kk * rate, state, doc_BT)
    y = F.layer_norm(y, (H,), eps=GROUP_NORM_EPS).reshape(B, T, D)
    y = y * vectors.ln_x_weight + vectors.ln_x_bias
    bonus = (r * k * vectors.r_k.view(N, H)).sum(-1, keepdim=True) * v
    return (y + bonus.reshape(B, T, D)) * rows.gate, state


def _native_serves(r: Tensor, head_dim: int) -> bool:
    if r.device.type != "cpu" or r.dtype not in build.DTYPES:
        return False
    return bool(native_serves_width(head_dim))


_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_ROWS = (
    "Tensor r, Tensor k, Tensor v, Tensor decay, Tensor rate, Tensor? share, Tensor? v_first, "
    "Tensor gate"
)
_VECTORS = (
    "Tensor w0, Tensor a0, Tensor? v0, Tensor k_k, Tensor k_a, Tensor r_k, Tensor weight, "
    "Tensor bias"
)
_library.define(  # type: ignore[no-untyped-call]
    f"time_mix({_ROWS}, {_VECTORS}, Tensor state, Tensor? flags_BT, int head_dim, "
    "bool signed, bool save) "
    "-> (Tensor, Tensor, Tensor[])",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(  # type: ignore[no-untyped-call]
    f"time_mix_backward({_ROWS}, {_VECTORS}, Tensor? flags_BT, int head_dim, "
    "bool signed, Tensor[] saved, "
    "Tensor dz, Tensor d_final) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "time_mix", "CPU")
def _forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """z, the final state, and with `save` what the backward pass needs."""
    rows, vectors, (state, flags_BT, head_dim, signed, save) = args[:8], args[8:16], args[16:]
    r = rows[0]
    B, T, D = r.shape
    N = D // head_dim
    for name, x in zip(Rows._fields, rows, strict=True):
        expect(name, x, (B, T, D), r.dtype)
    for name, x in zip(Vectors._fields, vectors, strict=True):
        expect(name, x, (D,), torch.float32)
    expect("the state", state, (B, N, head_dim, head_dim), torch.float32)
    expect("the documents", flags_BT, (B, T))
    z, final = torch.empty_like(r), torch.empty_like(state)
    kept = []
    if save:
        stretches = -(-T // STRETCH)
        checkpoints = state.new_empty(B, N, stretches, head_dim, head_dim)
        kept = [torch.empty_like(r), torch.empty_like(r, dtype=torch.float32), checkpoints]
    y, sa, checkpoints = (x.data_ptr() for x in kept) if save else (None, None, None)
    _native(head_dim).time_mix_forward(
        *(_places(rows), _places(vectors), GROUP_NORM_EPS, signed, r.dtype == torch.bfloat16),
        *(build.pointer(flags_BT), state.data_ptr(), z.data_ptr(), y, final.data_ptr()),
        *(sa, checkpoints, B, T, N, torch.get_num_threads()),
    )
    return z, final, kept


@torch.library.impl(_library, "time_mix_backward", "CPU")
def _backward_native(*args: Any) -> list[Tensor]:
    """The gradients of rows, vectors and state; empty tensors for those that are not there."""
    rows, vectors, (flags_BT, head_dim, signed, *rest) = args[:8], args[8:16], args[16:]
    saved, dz, d_final = rest
    y, sa, checkpoints = saved
    B, T, D = y.shape
    by_row = [y.new_empty(0) if x is None else torch.empty_like(x) for x in rows]
    sums, d_state = sa.new_empty(B, len(vectors), D), torch.empty_like(d_final)
    failed = _native(head_dim).time_mix_backward(
        *(_places(rows), _places(vectors), GROUP_NORM_EPS, signed, y.dtype == torch.bfloat16),
        *(build.pointer(flags_BT), y.data_ptr(), dz.data_ptr(), sa.data_ptr()),
        *(checkpoints.data_ptr(), d_final.data_ptr(), _places(by_row), sums.data_ptr()),
        *(d_state.data_ptr(), B, T, D // head_dim, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the states of one stretch of WKV-7")
    return [*by_row, *(x.clone() for x in sums.sum(0)), d_state]


def _places(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(build.pointer(x) for x in tensors))


def _native(head_dim: int) -> ctypes.CDLL:
    return _declare(build.library("time_mix", HEAD_DIM=head_dim))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    p, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    sizes = (size, size, size, integer)
    lib.time_mix_forward.restype = None
    lib.time_mix_forward.argtypes = [p, p, real, integer, integer, *[p] * 7, *sizes]
    lib.time_mix_backward.restype = integer
    lib.time_mix_backward.argtypes = [p, p, real, integer, integer, *[p] * 9, *sizes]
    return lib


@torch.library.register_fake("valkyrie::time_mix", lib=_library)  # type: ignore[untyped-decorator]
def _(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    r, state, head_dim, save = args[0], args[16], args[18], args[20]
    B, T, D = r.shape
    z, final = torch.empty_like(r), torch.empty_like(state)
    if not save:
        return z, final, []
    checkpoints = state.new_empty([B, D // head_dim, -(-T // STRETCH), head_dim, head_dim])
    return z, final, [torch.empty_like(r), torch.empty_like(r, dtype=torch.float32), checkpoints]


@torch.library.register_fake("valkyrie::time_mix_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(*args: Any) -> list[Tensor]:
    by_row = [args[0].new_empty([0]) if x is None else torch.empty_like(x) for x in args[:8]]
    return [*by_row, *(torch.empty_like(args[8]) for _ in range(8)), torch.empty_like(args[21])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    # else what is kept for the backward pass would be given gradients of zeros
    ctx.set_materialize_grads(False)
    ctx.state_shape = inputs[16].shape
    flags_BT, ctx.head_dim, ctx.signed = inputs[17:20]
    ctx.save_for_backward(*inputs[:16], flags_BT, *output[2])


def _backward(ctx: Any, dz: Tensor | None, d_final: Tensor | None, unused: Any) -> tuple[Any, ...]:
    # asked for once: activation checkpointing hands them out a single time
    tensors = ctx.saved_tensors
    *inputs, flags_BT = tensors[:17]
    saved = list(tensors[17:])
    if dz is None:
        dz = torch.zeros_like(inputs[0])
    if d_final is None:
        d_final = inputs[8].new_zeros(ctx.state_shape)
    grads = _backward_op(
        *(*inputs, flags_BT, ctx.head_dim, ctx.signed, saved),
        *(dz.to(inputs[0].dtype).contiguous(), d_final.contiguous()),
    )
    return (
        *(None if x is None else g for x, g in zip(inputs, grads, strict=False)),
        *(grads[16], None, None, None, None),
    )


torch.library.register_autograd("valkyrie::time_mix", _backward, setup_context=_setup, lib=_library)
once_differentiable(_library, "valkyrie::time_mix_backward")
_op = torch.ops.valkyrie.time_mix.default
_backward_op = torch.ops.valkyrie.time_mix_backward.default


@register_flop_formula(torch.ops.valkyrie.time_mix)
def _forward_flops(*shapes: Any, **kwargs: Any) -> int:
    """Of the recurrence; elementwise work is not counted, as torch does not."""
    B, T, D = shapes[0]
    return int(FLOPS_PER_STATE_ELEMENT * B * T * D * shapes[16][-1])


@register_flop_formula(torch.ops.valkyrie.time_mix_backward)
def _backward_flops(*shapes: Any, **kwargs: Any) -> int:
    B, T, D = shapes[0]
    return int(BACKWARD_FLOPS_PER_STATE_ELEMENT * B * T * D * shapes[17])
