"""RWKV's token shift, natively: every mixture of a token with the one before it in one pass.

Kernel in `csrc/shift_mix.cpp`. Shapes: B batch, T time, D model, M mixtures.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from valkyrie_core.kernels import build
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.build import pointers
from valkyrie_core.kernels.guard import expect, once_differentiable

COUNTS = (1, 6)
"""Mixtures that the kernel is made for: channel mix has one, time mix six."""
LAST, NOTHING = -1, -2
"""Sources: the last token of the window before, and none (zeros)."""

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "shift_mix(Tensor x, Tensor last, Tensor source, Tensor mix, ScalarType out) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(  # type: ignore[no-untyped-call]
    "shift_mix_backward(Tensor x, Tensor last, Tensor source, Tensor mix, Tensor[] dy) "
    "-> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def shift_mix(
    x_BTD: Tensor, last_BD: Tensor, source_BT: Tensor, mixes: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """y_m = x + (before - x) * mix_m, for every mixture; natively on a CPU in fp32 and bf16.

    Args:
        x_BTD: the window.
        last_BD: the last token of the window before, in the type of x.
        source_BT: int32; where the token before each one stands in its row, or LAST or NOTHING.
            Places with the same source follow each other directly.
        mixes: fp32 [D] each.

    Returns:
        [B, T, D] each, in the type of x, under autocast in autocast's.
    """
    native = x_BTD.device.type == "cpu" and x_BTD.dtype in build.DTYPES
    native = native and x_BTD.shape[-1] % 4 == 0
    native = native and len(mixes) in COUNTS and all(x.dtype == torch.float32 for x in mixes)
    if not native or not native_serves("shift_mix", "the token shift of RWKV-7 runs"):
        return shift_mix_naive(x_BTD, last_BD, source_BT, mixes)
    out = x_BTD.dtype
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        out = lower if lower in build.DTYPES else out
    x_BTD, last_BD = x_BTD.contiguous(), last_BD.contiguous()
    return tuple(_op(x_BTD, last_BD, source_BT.contiguous(), torch.stack(mixes), out))


def shift_mix_naive(
    x_BTD: Tensor, last_BD: Tensor, source_BT: Tensor, mixes: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The same in PyTorch operations."""
    known_BTD = torch.cat([last_BD[:, None], x_BTD], dim=1)
    index_BT1 = (source_BT.long() + 1).clamp(min=0)[..., None]
    before_BTD = known_BTD.gather(1, index_BT1.expand_as(x_BTD))
    before_BTD = before_BTD.masked_fill((source_BT == NOTHING)[..., None], 0)
    step_BTD = before_BTD - x_BTD
    return tuple(torch.addcmul(x_BTD, step_BTD, mix) for mix in mixes)


@torch.library.impl(_library, "shift_mix", "CPU")
def _forward(
    x: Tensor, last: Tensor, source: Tensor, mix: Tensor, out: torch.dtype
) -> list[Tensor]:
    B, T, D = x.shape
    expect("last", last, (B, D), x.dtype)
    expect("source", source, (B, T), torch.int32)
    expect("the mixes", mix, (len(mix), D), torch.float32)
    if T and not NOTHING <= int(source.min()) <= int(source.max()) < T:
        raise ValueError(f"a source is not within {NOTHING}..{T - 1}")
    ys = [torch.empty_like(x, dtype=out) for _ in mix]
    _native().shift_mix_forward(
        *(x.data_ptr(), x.dtype == torch.bfloat16, last.data_ptr(), source.data_ptr()),
        *(mix.data_ptr(), pointers(ys), out == torch.bfloat16, len(mix), *x.shape),
        torch.get_num_threads(),
    )
    return ys


@torch.library.impl(_library, "shift_mix_backward", "CPU")
def _backward_native(
    x: Tensor, last: Tensor, source: Tensor, mix: Tensor, dy: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    dy = [g.contiguous() for g in dy]
    # nothing is written where there is no token
    dx, d_last = torch.empty_like(x), torch.empty_like(last) if T else torch.zeros_like(last)
    lib = _native()
    blocks = B * -(-T // lib.shift_mix_block())
    d_mix = torch.empty(blocks, len(mix), D)
    lib.shift_mix_backward(
        *(x.data_ptr(), x.dtype == torch.bfloat16, last.data_ptr(), source.data_ptr()),
        *(mix.data_ptr(), pointers(dy), dy[0].dtype == torch.bfloat16),
        *(dx.data_ptr(), d_last.data_ptr(), d_mix.data_ptr(), len(mix), B, T, D),
        torch.get_num_threads(),
    )
    return dx, d_last, d_mix.sum(0)


def _native() -> ctypes.CDLL:
    return _declare(build.library("shift_mix"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    p, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.shift_mix_block.restype = size
    lib.shift_mix_forward.restype = None
    lib.shift_mix_forward.argtypes = [
        *(p, integer, p, p, p, p, integer, integer, size, size, size, integer)
    ]
    lib.shift_mix_backward.restype = None
    lib.shift_mix_backward.argtypes = [
        *(p, integer, p, p, p, p, integer, p, p, p, integer, size, size, size, integer)
    ]
    return lib


@torch.library.register_fake("valkyrie::shift_mix", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, last: Tensor, source: Tensor, mix: Tensor, out: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(x, dtype=out) for _ in range(mix.shape[0])]


@torch.library.register_fake("valkyrie::shift_mix_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor, last: Tensor, source: Tensor, mix: Tensor, dy: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(last), torch.empty_like(mix)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, last, source, mix, ctx.out = inputs
    ctx.save_for_backward(x, last, source, mix)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: list[Tensor | None]) -> tuple[Any, ...]:
    x, last, source, mix = ctx.saved_tensors
    # what nothing was made of has no gradient
    given = [torch.zeros_like(x, dtype=ctx.out) if g is None else g.to(ctx.out) for g in dy]
    dx, d_last, d_mix = _backward_op(x, last, source, mix, given)
    return dx, d_last, None, d_mix, None


torch.library.register_autograd(
    "valkyrie::shift_mix", _backward, setup_context=_setup, lib=_library
)
once_differentiable(_library, "valkyrie::shift_mix_backward")
_op = torch.ops.valkyrie.shift_mix.default
_backward_op = torch.ops.valkyrie.shift_mix_backward.default
