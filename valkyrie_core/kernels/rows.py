"""Rows of tokens to rows of experts and back, in native passes (`csrc/rows.cpp`).

A token has some slots; `places_RK` says where among all entries it lies for each of them, and is
below 0 for a slot that is not used. No two places are the same, and together they are all entries.

Shapes: R tokens, D model, K slots of a token, M entries.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from valkyrie_core.kernels import build
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.guard import expect, once_differentiable

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "rows_spread(Tensor x, Tensor places, SymInt count) -> Tensor",
    "rows_spread_backward(Tensor dy, Tensor places) -> Tensor",
    "rows_blend(Tensor y, Tensor weights, Tensor places) -> Tensor",
    "rows_blend_backward(Tensor y, Tensor weights, Tensor places, Tensor d) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]


def spread(x_RD: Tensor, places_RK: Tensor, count: int) -> Tensor:
    """[M, D]: every token's row at all of its places."""
    if not _serves(x_RD):
        return spread_naive(x_RD, places_RK, count)
    y_MD: Tensor = _spread_op(x_RD, places_RK, count)
    return y_MD


def spread_naive(x_RD: Tensor, places_RK: Tensor, count: int) -> Tensor:
    """The same in PyTorch operations."""
    tokens_M, _ = _origins(places_RK, count)
    return x_RD.index_select(0, tokens_M)


def blend(y_MD: Tensor, weights_RK: Tensor, places_RK: Tensor) -> Tensor:
    """[R, D]: every token's entries, weighted and summed."""
    if not _serves(y_MD):
        return blend_naive(y_MD, weights_RK, places_RK)
    out_RD: Tensor = _blend_op(y_MD, weights_RK.float(), places_RK)
    return out_RD


def blend_naive(y_MD: Tensor, weights_RK: Tensor, places_RK: Tensor) -> Tensor:
    """The same in PyTorch operations."""
    tokens_M, slots_M = _origins(places_RK, len(y_MD))
    weights_M1 = weights_RK[tokens_M, slots_M][:, None].to(y_MD.dtype)
    out_RD = y_MD.new_zeros(len(weights_RK), y_MD.shape[1])
    return out_RD.index_add(0, tokens_M, y_MD * weights_M1)


def _origins(places_RK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The token and the slot of every entry."""
    K = places_RK.shape[1]
    flat = places_RK.flatten()
    # what is not used goes behind the last entry
    target = torch.where(flat < 0, count, flat)
    from_M = torch.empty(count + 1, dtype=torch.int64, device=flat.device)
    from_M = from_M.scatter(0, target, torch.arange(len(flat), device=flat.device))[:count]
    return from_M // K, from_M % K


def _serves(x: Tensor) -> bool:
    native = x.device.type == "cpu" and x.dtype in build.DTYPES
    return native and native_serves("rows", "tokens go to their experts")


@torch.library.impl(_library, "rows_spread", "CPU")
def _spread(x: Tensor, places: Tensor, count: int) -> Tensor:
    x, places = x.contiguous(), _checked(places, len(x), count)
    y = x.new_empty(count, x.shape[1])
    _native().rows_spread(_at(x), _at(places), _at(y), *_rest(x, places, x.shape[1]))
    return y


@torch.library.impl(_library, "rows_spread_backward", "CPU")
def _spread_backward_native(dy: Tensor, places: Tensor) -> Tensor:
    dy, places = dy.contiguous(), places.contiguous()
    dx = dy.new_empty(len(places), dy.shape[1])
    _native().rows_gather(_at(dy), None, _at(places), _at(dx), *_rest(dy, places, dy.shape[1]))
    return dx


@torch.library.impl(_library, "rows_blend", "CPU")
def _blend(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    expect("weights", weights, places.shape, torch.float32)
    y, weights, places = (
        y.contiguous(),
        weights.contiguous(),
        _checked(places, len(weights), len(y)),
    )
    out = y.new_empty(len(places), y.shape[1])
    _native().rows_gather(
        *(_at(y), _at(weights), _at(places), _at(out)), *_rest(y, places, y.shape[1])
    )
    return out


@torch.library.impl(_library, "rows_blend_backward", "CPU")
def _blend_backward_native(
    y: Tensor, weights: Tensor, places: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    expect("the gradient", d, (len(places), y.shape[1]), y.dtype)
    y, weights, places, d = (x.contiguous() for x in (y, weights, places, d))
    dy, dw = torch.empty_like(y), torch.empty_like(weights)
    _native().rows_gather_backward(
        *map(_at, (y, weights, places, d, dy, dw)), *_rest(y, places, y.shape[1])
    )
    return dy, dw


def _checked(places: Tensor, rows: int, count: int) -> Tensor:
    expect("places", places, (rows, *places.shape[1:]), torch.int64)
    if places.numel() and int(places.max()) >= count:
        raise ValueError(f"a place is {int(places.max())}, of {count} entries")
    return places.contiguous()


def _at(x: Tensor) -> int:
    return x.data_ptr()


def _rest(x: Tensor, places: Tensor, D: int) -> tuple[int, int, int, int, int]:
    R, K = places.shape
    return int(x.dtype == torch.bfloat16), R, K, D, torch.get_num_threads()


def _native() -> ctypes.CDLL:
    return _declare(build.library("rows"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    rest = [integer, size, size, size, integer]
    for name, pointers in (("rows_spread", 3), ("rows_gather", 4), ("rows_gather_backward", 6)):
        function = getattr(lib, name)
        function.restype = None
        function.argtypes = [*[pointer] * pointers, *rest]
    return lib


@torch.library.register_fake("valkyrie::rows_spread", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, places: Tensor, count: int) -> Tensor:
    return x.new_empty(count, x.shape[1])


@torch.library.register_fake("valkyrie::rows_spread_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(dy: Tensor, places: Tensor) -> Tensor:
    return dy.new_empty(places.shape[0], dy.shape[1])


@torch.library.register_fake("valkyrie::rows_blend", lib=_library)  # type: ignore[untyped-decorator]
def _(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    return y.new_empty(places.shape[0], y.shape[1])


@torch.library.register_fake("valkyrie::rows_blend_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(y: Tensor, weights: Tensor, places: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _spread_setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _spread_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (places,) = ctx.saved_tensors
    return _spread_backward_op(dy, places), None, None


def _blend_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _blend_backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
    y, weights, places = ctx.saved_tensors
    dy, dw = _blend_backward_op(y, weights, places, d.to(y.dtype))
    return dy, dw, None


torch.library.register_autograd(
    "valkyrie::rows_spread", _spread_backward, setup_context=_spread_setup, lib=_library
)
torch.library.register_autograd(
    "valkyrie::rows_blend", _blend_backward, setup_context=_blend_setup, lib=_library
)
once_differentiable(_library, "valkyrie::rows_spread_backward")
once_differentiable(_library, "valkyrie::rows_blend_backward")
_spread_op = torch.ops.valkyrie.rows_spread.default
_spread_backward_op = torch.ops.valkyrie.rows_spread_backward.default
_blend_op = torch.ops.valkyrie.rows_blend.default
_blend_backward_op = torch.ops.valkyrie.rows_blend_backward.default
