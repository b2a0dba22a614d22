"""Adafactor for a matrix stored in bf16, and random rounding: natively on a CPU.

Shazeer & Stern 2018 (arXiv 1804.04235) in `csrc/adafactor.cpp`; Gupta et al. 2015 (arXiv
1502.02551). A bf16 number has 8 bits: an update smaller than a 256th of a weight would be rounded
away, every time. So an update is computed in fp32 and rounded up or down at random, with the
chances that keep its mean. What is drawn for an element follows from a seed and its place.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math

import torch
from torch import Tensor

from valkyrie_core.kernels import build
from valkyrie_core.kernels.announce import native_serves
from valkyrie_core.kernels.guard import expect

PIECE = 1 << 14
"""Numbers whose squares are summed together."""
AT_ONCE = 1 << 22
"""Numbers that are rounded at once in PyTorch: what is drawn for them stays small."""
_MASK = 0xFFFFFFFF

_library = torch.library.Library("valkyrie", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "adafactor_(Tensor(a!) weight, Tensor gradient, Tensor(b!) row_var, Tensor(c!) column_var, "
    "float rate, float share, float epsilon, float least_scale, float d, float decay, int seed) "
    "-> ()"
)
_library.define("sum_of_squares(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]


def serves(weight: Tensor) -> bool:
    """Whether the native update takes this parameter."""
    plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.dim() == 2
    return (
        plain
        and weight.is_contiguous()
        and native_serves("adafactor", "updates of bf16 weights run")
    )


def adafactor_(
    weight_RC: Tensor,
    gradient_RC: Tensor,
    row_var_R1: Tensor,
    column_var_1C: Tensor,
    *,
    rate: float,
    share: float,
    epsilon: float,
    least_scale: float,
    d: float,
    decay: float,
    seed: int,
) -> None:
    """One update, in place, as `torch.optim.Adafactor` makes it; the result is rounded at random.

    Args:
        row_var_R1, column_var_1C: running means of the squared gradient, fp32, moved by `share`.
        rate: the relative step; times the root mean square of the weights, or `least_scale`.
        epsilon: the least size of a gradient, squared where squares are compared.
        d: updates whose root mean square is larger are scaled down to it.
        decay: the share of the weights that is taken off before.
        seed: 64 bits; the same seed draws the same.
    """
    _update(
        *(weight_RC, gradient_RC, row_var_R1, column_var_1C),
        *(rate, share, epsilon, least_scale, d, decay, seed),
    )


def norm(x: Tensor) -> float:
    """The Euclidean norm, summed in fp32 or better."""
    narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    if narrow and native_serves("adafactor", "norms of bf16 gradients run"):
        return math.sqrt(float(_squares(x)))
    precise = torch.promote_types(x.dtype, torch.float32)
    return float(torch.linalg.vector_norm(x, dtype=precise))


def round_into(stored: Tensor, exact: Tensor, seed: int) -> None:
    """Writes fp32 numbers into a bf16 tensor, each to one of its two neighbours at random.

    The chance of a neighbour is its nearness, so that the mean is the number itself. What bf16 can
    hold is kept as it is. The same draws as the native update's.
    """
    flat, exact = stored.view(-1), exact.reshape(-1)
    first, second = _keys(seed)
    for start in range(0, flat.numel(), AT_ONCE):
        piece = exact[start : start + AT_ONCE]
        place = torch.arange(start, start + piece.numel(), device=flat.device)
        draws = _mixed(_mixed((place & _MASK) ^ first) ^ second) >> 16
        # bf16 is the upper half of fp32: adding less than 2^16 carries by chance
        upper = (piece.view(torch.int32) + draws.int()) & -0x10000
        flat[start : start + AT_ONCE] = upper.view(torch.float32).to(torch.bfloat16)


def _keys(seed: int) -> tuple[int, int]:
    """Two words of a hash: a seed by itself would only permute what its neighbours draw."""
    digest = hashlib.sha256(seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _mixed(x: Tensor) -> Tensor:
    """An integer hash of 32 bits with little bias (Wellons, "lowbias32"), held in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


@torch.library.impl(_library, "adafactor_", "CPU")
def _native_update(
    weight: Tensor,
    gradient: Tensor,
    row_var: Tensor,
    column_var: Tensor,
    rate: float,
    share: float,
    epsilon: float,
    least_scale: float,
    d: float,
    decay: float,
    seed: int,
) -> None:
    R, C = weight.shape
    expect("the weights", weight, (R, C), torch.bfloat16)
    expect("the gradient", gradient, (R, C), torch.bfloat16)
    expect("the rows' variances", row_var, (R, 1), torch.float32)
    expect("the columns' variances", column_var, (1, C), torch.float32)
    gradient = gradient.contiguous()
    lib = _native()
    scratch = torch.empty(lib.adafactor_blocks(R), C)
    of_rows = torch.empty(2, R, dtype=torch.float64)
    lib.adafactor(
        *(x.data_ptr() for x in (weight, gradient, row_var, column_var, scratch, of_rows)),
        *(R, C, rate, share, epsilon, least_scale, d, decay),
        *(*_keys(seed), torch.get_num_threads()),
    )


@torch.library.impl(_library, "sum_of_squares", "CPU")
def _native_squares(x: Tensor) -> Tensor:
    expect("x", x, x.shape, torch.bfloat16)
    x = x.contiguous()
    of_pieces = torch.empty(-(-x.numel() // PIECE), dtype=torch.float64)
    total = _native().sum_of_squares(
        x.data_ptr(), x.numel(), of_pieces.data_ptr(), torch.get_num_threads()
    )
    return torch.tensor(total, dtype=torch.float64)


def _native() -> ctypes.CDLL:
    return _declare(build.library("adafactor"))


@functools.cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    real, word = ctypes.c_double, ctypes.c_uint32
    lib.adafactor_blocks.restype = size
    lib.adafactor_blocks.argtypes = [size]
    lib.adafactor.restype = None
    lib.adafactor.argtypes = [*[pointer] * 6, size, size, *[real] * 6, word, word, integer]
    lib.sum_of_squares.restype = real
    lib.sum_of_squares.argtypes = [pointer, size, pointer, integer]
    return lib


@torch.library.register_fake("valkyrie::adafactor_", lib=_library)  # type: ignore[untyped-decorator]
def _(
    weight: Tensor,
    gradient: Tensor,
    row_var: Tensor,
    column_var: Tensor,
    rate: float,
    share: float,
    epsilon: float,
    least_scale: float,
    d: float,
    decay: float,
    seed: int,
) -> None:
    return None


@torch.library.register_fake("valkyrie::sum_of_squares", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


_update = torch.ops.valkyrie.adafactor_.default
_squares = torch.ops.valkyrie.sum_of_squares.default
