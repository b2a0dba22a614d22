"""The summed cross-entropy of a linear head, its gradients made along with it.

The logits of a chunk of rows are made, turned in place into their own gradient by native code
(`csrc/loss.cpp`), multiplied into the gradients of inputs and weights at once, and forgotten: they
are never held all at once and never made again. The gradients wait, unscaled, for the backward
pass.

Shapes: R rows, D model, V vocabulary.
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
from valkyrie_core.kernels.guard import expect

IGNORED = -100
"""The target that is not scored."""
CHUNK_BYTES = 1 << 24
"""The logits of a chunk: 16 MiB, whatever the vocabulary."""

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, ScalarType dtype, "
    "bool of_x, bool of_weight) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def fused_serves(x_RD: Tensor, weight_VD: Tensor) -> bool:
    """Whether `linear_cross_entropy` takes these: gradients wanted, on a CPU, in fp32 or bf16."""
    wanted = torch.is_grad_enabled() and (x_RD.requires_grad or weight_VD.requires_grad)
    types = all(tensor.dtype in build.DTYPES for tensor in (x_RD, weight_VD))
    if not wanted or not types or x_RD.device.type != "cpu" or _dtype(x_RD) not in build.DTYPES:
        return False
    return native_serves("loss", "the loss runs")


def linear_cross_entropy(x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    """The sum over rows of the cross-entropy of x @ weight^T, in nats, fp32.

    Under autocast the products are in its type; the gradient of the weights is summed in fp32.
    Gradients are made with the loss, so there is no second derivative.

    Args:
        x_RD: inputs of the head.
        weight_VD: the head's weights.
        targets_R: int64; -100 is not scored.

    Raises:
        IndexError: a target is neither -100 nor a row of the weights.
    """
    x_grad, weight_grad = x_RD.requires_grad, weight_VD.requires_grad
    out: tuple[Tensor, ...] = _op(x_RD, weight_VD, targets_R, _dtype(x_RD), x_grad, weight_grad)
    return out[0]


def _dtype(x_RD: Tensor) -> torch.dtype:
    """The type of the products."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x_RD.dtype


@torch.library.impl(_library, "linear_cross_entropy", "CPU")
def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of nats, d nats / d x, d nats / d weight); a gradient not asked for is empty."""
    R, (V, D) = x.shape[0], weight.shape
    expect("x", x, (R, D))
    expect("the targets", targets, (R,), torch.int64)
    x_RD, weight_VD = x.to(dtype), weight.to(dtype)
    rows = max(1, CHUNK_BYTES // dtype.itemsize // V)
    nats_R = torch.empty(R, dtype=torch.float32)
    dx = torch.empty_like(x_RD) if of_x else x_RD.new_empty(0)
    dw = torch.zeros(V, D, dtype=torch.float32) if of_weight else torch.empty(0)
    for start in range(0, R, rows):
        chunk = slice(start, start + rows)
        logits_RV = torch.mm(x_RD[chunk], weight_VD.t())
        _softmax_less_onehot(logits_RV, targets[chunk].contiguous(), nats_R[chunk])
        if of_x:
            torch.mm(logits_RV, weight_VD, out=dx[chunk])
        if of_weight:
            dw += torch.mm(logits_RV.t(), x_RD[chunk])
    return nats_R.sum(), dx, dw


def _softmax_less_onehot(logits_RV: Tensor, targets_R: Tensor, nats_R: Tensor) -> None:
    """Writes the losses, and over the logits their gradients."""
    R, V = logits_RV.shape
    failed = _native(build.library("loss")).cross_entropy(
        logits_RV.data_ptr(),
        int(logits_RV.dtype == torch.bfloat16),
        targets_R.data_ptr(),
        nats_R.data_ptr(),
        *(R, V, IGNORED, torch.get_num_threads()),
    )
    if failed:
        raise IndexError(f"a target is not within 0..{V - 1} and not {IGNORED}")


@functools.cache
def _native(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.cross_entropy.restype = integer
    lib.cross_entropy.argtypes = [pointer, integer, pointer, pointer, size, size, size, integer]
    return lib


@torch.library.register_fake("valkyrie::linear_cross_entropy", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    single = torch.float32
    dx = x.new_empty(x.shape if of_x else [0], dtype=dtype)
    dw = weight.new_empty(weight.shape if of_weight else [0], dtype=single)
    return x.new_empty([], dtype=single), dx, dw


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.types = inputs[0].dtype, inputs[1].dtype
    ctx.wanted = inputs[4], inputs[5]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_nats: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if d_nats is None:
        return (None,) * 6
    grads = [
        (grad.float() * d_nats).to(dtype) if wanted else None
        for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.types, ctx.wanted, strict=True)
    ]
    return (*grads, None, None, None, None)


torch.library.register_autograd(
    "valkyrie::linear_cross_entropy", _backward, setup_context=_setup, lib=_library
)
_op = torch.ops.valkyrie.linear_cross_entropy.default


@register_flop_formula(torch.ops.valkyrie.linear_cross_entropy)
def _flops(
    x_shape: torch.Size, weight_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """The logits, and the two gradients that are made with them."""
    gradients = sum(bool(wanted) for wanted in args[2:4])
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1] * (1 + gradients)
