"""silu(gate) * up in one native pass (`csrc/gated.cpp`), and its gradients in another."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from valkyrie_core.kernels import build
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.guard import expect, once_differentiable

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "silu_times(Tensor gate, Tensor up) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.define(  # type: ignore[no-untyped-call]
    "silu_times_backward(Tensor gate, Tensor up, Tensor dy) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape and type: natively on a CPU in fp32 and bf16."""
    native = gate.device.type == "cpu" and gate.dtype in build.DTYPES and gate.dtype == up.dtype
    if not native or not native_serves("gated", "the gate of SwiGLU runs"):
        return silu_times_naive(gate, up)
    out: Tensor = _op(gate, up)
    return out


def silu_times_naive(gate: Tensor, up: Tensor) -> Tensor:
    """The same in PyTorch operations."""
    return F.silu(gate) * up


@torch.library.impl(_library, "silu_times", "CPU")
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    expect("up", up, gate.shape, gate.dtype)
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _native().silu_times_forward(*_places(gate, up, y), *_rest(gate))
    return y


@torch.library.impl(_library, "silu_times_backward", "CPU")
def _backward_native(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _native().silu_times_backward(*_places(gate, up, dy, d_gate, d_up), *_rest(gate))
    return d_gate, d_up


def _places(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in tensors)


def _rest(gate: Tensor) -> tuple[int, int, int]:
    return int(gate.dtype == torch.bfloat16), gate.numel(), torch.get_num_threads()


def _native() -> ctypes.CDLL:
    return _declare(build.library("gated"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.silu_times_forward.restype = None
    lib.silu_times_forward.argtypes = [*[pointer] * 3, integer, size, integer]
    lib.silu_times_backward.restype = None
    lib.silu_times_backward.argtypes = [*[pointer] * 5, integer, size, integer]
    return lib


@torch.library.register_fake("valkyrie::silu_times", lib=_library)  # type: ignore[untyped-decorator]
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("valkyrie::silu_times_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    grads: tuple[Tensor, Tensor] = _backward_op(gate, up, dy.to(gate.dtype))
    return grads


torch.library.register_autograd(
    "valkyrie::silu_times", _backward, setup_context=_setup, lib=_library
)
once_differentiable(_library, "valkyrie::silu_times_backward")
_op = torch.ops.valkyrie.silu_times.default
_backward_op = torch.ops.valkyrie.silu_times_backward.default
