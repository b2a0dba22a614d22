"""RWKV-7's time mix between its matrices: gates, keys, the recurrence, group norm, read-out.

One operator each way: what surrounds the recurrence is elementwise and costs, as PyTorch
operations, several times what the recurrence does (`csrc/time_mix.cpp`).

Shapes: B batch, T time, D model, N heads, H head width.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from valkyrie_core.kernels import build, native, native_serves_width, wkv7
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.build import pointers
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
    rows: Rows, vectors: Vectors, state: Tensor, doc_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From the matrices' outputs to the input of the last matrix.

    Args:
        state: [B, N, H, H] as [value, key]; its shape says how wide a head is.
        doc_BT: as in `wkv7`.

    Returns:
        [B, T, D] in the type of the rows, and the state after the last token.
    """
    head_dim = state.shape[-1]
    if not _native_serves(rows.r, head_dim):
        return time_mix_naive(rows, vectors, state, doc_BT)
    dtype = rows.r.dtype
    same = [None if x is None else x.to(dtype).contiguous() for x in rows]
    flat = [None if x is None else x.float().flatten() for x in vectors]
    flags_BT = None if doc_BT is None else flags(doc_BT, rows.r)
    save = torch.is_grad_enabled()
    z, final, *_ = _op(*same, *flat, state.float().contiguous(), flags_BT, head_dim, save)
    return z, final


def time_mix_naive(
    rows: Rows, vectors: Vectors, state: Tensor, doc_BT: Tensor | None
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
    r, log_decay, k, v, rate = (heads(x) for x in (rows.r, log_decay, k, v, rate))
    y, state = wkv7(r, log_decay, k, v, -kk, kk * rate, state, doc_BT)
    y = F.layer_norm(y, (H,), eps=GROUP_NORM_EPS).reshape(B, T, D)
    y = y * vectors.ln_x_weight + vectors.ln_x_bias
    bonus = (r * k * vectors.r_k.view(N, H)).sum(-1, keepdim=True) * v
    return (y + bonus.reshape(B, T, D)) * rows.gate, state


def _native_serves(r: Tensor, head_dim: int) -> bool:
    if r.device.type != "cpu" or r.dtype not in build.DTYPES or head_dim > _WIDEST:
        return False
    return bool(native_serves_width(head_dim)) and bool(
        native_serves("time_mix", "the gates and norms of RWKV-7 run")
    )


_WIDEST = 1024
"""The widest head, as in the kernel's source."""
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
    f"time_mix({_ROWS}, {_VECTORS}, Tensor state, Tensor? flags_BT, int head_dim, bool save) "
    "-> (Tensor, Tensor, Tensor[])",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(  # type: ignore[no-untyped-call]
    f"time_mix_backward({_ROWS}, {_VECTORS}, Tensor? flags_BT, int head_dim, Tensor[] saved, "
    "Tensor dz, Tensor d_final) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "time_mix", "CPU")
def _forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """z, the final state, and with `save` what the backward pass needs."""
    rows, vectors = Rows(*args[:8]), Vectors(*args[8:16])
    state, flags_BT, head_dim, save = args[16:]
    lib, sizes = _native(), _sizes(rows.r, head_dim)
    log_decay = torch.empty_like(rows.r, dtype=torch.float32)
    k, a, b = (torch.empty_like(rows.r) for _ in range(3))
    v = rows.v if rows.share is None else torch.empty_like(rows.v)
    lib.time_mix_prepare(
        *(_prepare_rows(rows), _prepare_vectors(vectors), pointers([log_decay, k, v, a, b])), *sizes
    )
    wkv = [_heads(x, head_dim) for x in (rows.r, log_decay, k, v, a, b)]
    y, final, sa, checkpoints = native.forward(wkv, flags_BT, state, save)
    z = torch.empty_like(rows.r)
    lib.time_mix_read_out(
        *(pointers([y, rows.r, k, v, rows.gate]), _read_out_vectors(vectors)),
        *(GROUP_NORM_EPS, z.data_ptr(), *sizes),
    )
    if not save:
        return z, final, []
    # an output may not be an input: the first layer's values are there already
    kept = [log_decay, k, a, b, y, sa, checkpoints]
    return z, final, kept if rows.share is None else [*kept, v]


@torch.library.impl(_library, "time_mix_backward", "CPU")
def _backward_native(*args: Any) -> list[Tensor]:
    """The gradients of rows, vectors and state; empty tensors for those that are not there."""
    rows, vectors = Rows(*args[:8]), Vectors(*args[8:16])
    flags_BT, head_dim, saved, dz, d_final = args[16:]
    log_decay, k, a, b, y, sa, checkpoints, *mixed = saved
    v = mixed[0] if mixed else rows.v
    lib, sizes = _native(), _sizes(rows.r, head_dim)
    like = torch.empty_like
    # of the read-out: y, r, k, v, gate
    read = [like(rows.r) for _ in range(5)]
    blocks = -(-(rows.r.shape[0] * rows.r.shape[1]) // lib.time_mix_block())
    read_sums = torch.empty(blocks, 3, rows.r.shape[2])
    lib.time_mix_read_out_back(
        *(pointers([y, rows.r, k, v, rows.gate]), _read_out_vectors(vectors), GROUP_NORM_EPS),
        *(dz.data_ptr(), pointers(read), read_sums.data_ptr(), *sizes),
    )
    dy, dr_read, dk_read, dv_read, d_gate = read
    wkv = [_heads(x, head_dim) for x in (rows.r, log_decay, k, v, a, b)]
    grads, d_state = native.backward(wkv, flags_BT, sa, checkpoints, _heads(dy, head_dim), d_final)
    d_r, d_log_decay, d_k, d_v, d_a, d_b = grads
    to = [like(rows.r) for _ in range(4)]
    more = [like(rows.r) if rows.share is not None else rows.r.new_empty(0) for _ in range(2)]
    sums = torch.empty(blocks, 5, rows.r.shape[2])
    lib.time_mix_prepare_back(
        *(_prepare_rows(rows), _prepare_vectors(vectors)),
        pointers([log_decay, d_log_decay, d_k, d_v, d_a, d_b, dk_read, dv_read, dr_read]),
        *(pointers([*to, *more, d_r]), sums.data_ptr(), *sizes),
    )
    to_k, to_v, to_decay, to_rate = to
    by_row = [d_r.view_as(rows.r), to_k, to_v, to_decay, to_rate, *more, d_gate]
    w0, a0, v0, k_k, k_a = (x.clone() for x in sums.sum(0))
    weight, bias, r_k = (x.clone() for x in read_sums.sum(0))
    return [*by_row, w0, a0, v0, k_k, k_a, r_k, weight, bias, d_state]


def _heads(x_BTD: Tensor, head_dim: int) -> Tensor:
    B, T, D = x_BTD.shape
    return x_BTD.view(B, T, D // head_dim, head_dim)


def _sizes(x_BTD: Tensor, head_dim: int) -> tuple[int, int, int, int, int]:
    B, T, D = x_BTD.shape
    return int(x_BTD.dtype == torch.bfloat16), B * T, D, head_dim, torch.get_num_threads()


def _places(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(build.pointer(x) for x in tensors))


def _prepare_rows(x: Rows) -> ctypes.Array[ctypes.c_void_p]:
    return _places(x.k, x.v, x.decay, x.rate, x.share, x.v_first)


def _prepare_vectors(x: Vectors) -> ctypes.Array[ctypes.c_void_p]:
    return _places(x.w0, x.a0, x.v0, x.k_k, x.k_a)


def _read_out_vectors(x: Vectors) -> ctypes.Array[ctypes.c_void_p]:
    return _places(x.ln_x_weight, x.ln_x_bias, x.r_k)


def _native() -> ctypes.CDLL:
    return _declare(build.library("time_mix"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    p, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    sizes = (integer, size, size, size, integer)
    lib.time_mix_block.restype = size
    for name, arguments in {
        "prepare": (p, p, p),
        "prepare_back": (p, p, p, p, p),
        "read_out": (p, p, real, p),
        "read_out_back": (p, p, real, p, p, p),
    }.items():
        function = getattr(lib, f"time_mix_{name}")
        function.restype = None
        function.argtypes = [*arguments, *sizes]
    return lib


@torch.library.register_fake("valkyrie::time_mix", lib=_library)  # type: ignore[untyped-decorator]
def _(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    r, share, state, head_dim, save = args[0], args[5], args[16], args[18], args[19]
    B, T, D = r.shape
    z, final = torch.empty_like(r), torch.empty_like(state)
    if not save:
        return z, final, []
    shape = [B, D // head_dim, -(-T // STRETCH), head_dim, head_dim]
    kept = [
        torch.empty_like(r, dtype=torch.float32),
        *(torch.empty_like(r) for _ in range(3)),
        r.new_empty([B, T, D // head_dim, head_dim]),
        r.new_empty([B, T, D // head_dim, head_dim], dtype=torch.float32),
        r.new_empty(shape, dtype=torch.float32),
    ]
    return z, final, kept if share is None else [*kept, torch.empty_like(r)]


@torch.library.register_fake("valkyrie::time_mix_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(*args: Any) -> list[Tensor]:
    r, share, w0, d_final = args[0], args[5], args[8], args[20]
    more = [torch.empty_like(r) if share is not None else r.new_empty([0]) for _ in range(2)]
    return [
        *(torch.empty_like(r) for _ in range(5)),
        *more,
        torch.empty_like(r),
        *(torch.empty_like(w0) for _ in range(8)),
        torch.empty_like(d_final),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    # else what is kept for the backward pass would be given gradients of zeros
    ctx.set_materialize_grads(False)
    ctx.state_shape = inputs[16].shape
    flags_BT, ctx.head_dim = inputs[17], inputs[18]
    ctx.save_for_backward(*inputs[:16], flags_BT, *output[2])


def _backward(ctx: Any, dz: Tensor | None, d_final: Tensor | None, unused: Any) -> tuple[Any, ...]:
    *inputs, flags_BT = ctx.saved_tensors[:17]
    saved = list(ctx.saved_tensors[17:])
    if dz is None:
        dz = torch.zeros_like(inputs[0])
    if d_final is None:
        d_final = inputs[8].new_zeros(ctx.state_shape)
    grads = _backward_op(
        *(*inputs, flags_BT, ctx.head_dim, saved),
        *(dz.to(inputs[0].dtype).contiguous(), d_final.contiguous()),
    )
    return (
        *(None if x is None else g for x, g in zip(inputs, grads, strict=False)),
        *(grads[16], None, None, None),
    )


torch.library.register_autograd("valkyrie::time_mix", _backward, setup_context=_setup, lib=_library)
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
