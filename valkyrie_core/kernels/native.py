"""The native WKV-7 kernel for the CPU (`csrc/wkv7.cpp`), called through ctypes."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from valkyrie_core.kernels import build
from valkyrie_core.kernels.build import kinds, pointer, pointers


def why_not(head_dim: int) -> str | None:
    """None where the kernel for this head width works here, else the reason."""
    if head_dim % 4:
        return f"a head of {head_dim} is no multiple of 4"
    try:
        library(head_dim)
    except build.BuildError as error:
        return str(error)
    return None


def library(head_dim: int) -> ctypes.CDLL:
    """The kernel for one head width, built on first use.

    Raises:
        BuildError: it can't be built or loaded here.
    """
    return _declare(build.library("wkv7", HEAD_DIM=head_dim))


def forward(
    inputs: list[Tensor], flags_BT: Tensor | None, state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, and with `save` what the backward pass needs (else empty tensors).

    `inputs` are r, log_decay, k, v, a, b: [B, T, N, H], contiguous, each fp32 or bf16.
    """
    B, T, N, H = inputs[0].shape
    lib = library(H)
    y = torch.empty_like(inputs[0])
    final = torch.empty(B, N, H, H)
    stretches = -(-T // lib.wkv7_checkpoint())
    sa = torch.empty(B, T, N, H) if save else torch.empty(0)
    checkpoints = torch.empty(B, N, stretches, H, H) if save else torch.empty(0)
    lib.wkv7_forward(
        pointers(inputs),
        kinds(inputs),
        pointer(flags_BT),
        pointer(state),
        y.data_ptr(),
        int(y.dtype == torch.bfloat16),
        final.data_ptr(),
        sa.data_ptr() if save else None,
        checkpoints.data_ptr() if save else None,
        *(B, T, N, torch.get_num_threads()),
    )
    return y, final, sa, checkpoints


def backward(
    inputs: list[Tensor],
    flags_BT: Tensor | None,
    sa: Tensor,
    checkpoints: Tensor,
    dy: Tensor,
    d_final: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the six inputs, each in its own type, and of the initial state."""
    B, T, N, H = inputs[0].shape
    grads = [torch.empty_like(x) for x in inputs]
    d_state = torch.empty(B, N, H, H)
    failed = library(H).wkv7_backward(
        pointers(inputs),
        kinds(inputs),
        pointer(flags_BT),
        sa.data_ptr(),
        checkpoints.data_ptr(),
        dy.data_ptr(),
        int(dy.dtype == torch.bfloat16),
        d_final.data_ptr(),
        pointers(grads),
        d_state.data_ptr(),
        *(B, T, N, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the states of one stretch of WKV-7")
    return grads, d_state


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.wkv7_checkpoint.restype = integer
    lib.wkv7_forward.restype = None
    lib.wkv7_forward.argtypes = [
        *(pointer, pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer),
        *(size, size, size, integer),
    ]
    lib.wkv7_backward.restype = integer
    lib.wkv7_backward.argtypes = [
        *(pointer, pointer, pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer),
        *(size, size, size, integer),
    ]
    return lib
