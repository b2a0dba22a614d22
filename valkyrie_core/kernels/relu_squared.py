"""relu(x)^2 in one native pass (`csrc/relu_squared.cpp`), and its gradient in another."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from valkyrie_core.kernels import build
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.guard import once_differentiable

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "relu_squared(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.define(  # type: ignore[no-untyped-call]
    "relu_squared_backward(Tensor x, Tensor dy) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 of any shape: natively on a CPU in fp32 and bf16."""
    native = x.device.type == "cpu" and x.dtype in build.DTYPES
    if not native or not native_serves("relu_squared", "the squared ReLU of channel mix runs"):
        return relu_squared_naive(x)
    out: Tensor = _op(x)
    return out


def relu_squared_naive(x: Tensor) -> Tensor:
    """The same in PyTorch operations."""
    return torch.relu(x).square()


@torch.library.impl(_library, "relu_squared", "CPU")
def _forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _native().relu_squared_forward(x.data_ptr(), y.data_ptr(), *_rest(x))
    return y


@torch.library.impl(_library, "relu_squared_backward", "CPU")
def _backward_native(x: Tensor, dy: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    _native().relu_squared_backward(x.data_ptr(), dy.data_ptr(), dx.data_ptr(), *_rest(x))
    return dx


def _rest(x: Tensor) -> tuple[int, int, int]:
    return int(x.dtype == torch.bfloat16), x.numel(), torch.get_num_threads()


def _native() -> ctypes.CDLL:
    return _declare(build.library("relu_squared"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.relu_squared_forward.restype = None
    lib.relu_squared_forward.argtypes = [pointer, pointer, integer, size, integer]
    lib.relu_squared_backward.restype = None
    lib.relu_squared_backward.argtypes = [pointer, pointer, pointer, integer, size, integer]
    return lib


@torch.library.register_fake("valkyrie::relu_squared", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("valkyrie::relu_squared_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    dx: Tensor = _backward_op(x, dy.to(x.dtype))
    return dx


torch.library.register_autograd(
    "valkyrie::relu_squared", _backward, setup_context=_setup, lib=_library
)
once_differentiable(_library, "valkyrie::relu_squared_backward")
_op = torch.ops.valkyrie.relu_squared.default
_backward_op = torch.ops.valkyrie.relu_squared_backward.default
