"""The WKV-7 kernel, forward and backward, against attention and against its own slower forms.

One window of 8 heads of 64 (a width of 512): what a layer of a 50M model computes between its
projections. SDPA is torch's own; on a CPU it runs its flash kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import limits
from benchmarks.result import Findings, Gate
from benchmarks.timing import Announce, Call, Timing, side_by_side
from valkyrie_core import kernels
from valkyrie_core.kernels import wkv_op

HEADS, HEAD_DIM = 8, 64
NATIVE, NATIVE_BF16 = "native fp32", "native bf16"
CHUNKED, NAIVE = "chunked PyTorch fp32", "naive PyTorch fp32"
SDPA, SDPA_BF16 = "SDPA fp32", "SDPA bf16"
AGAINST_SDPA = {512: Gate(1.5, 2), 2048: Gate(4, 8), 16384: Gate(16, 30)}
AGAINST_CHUNKED = {2048: Gate(4, 8)}


class Length(NamedTuple):
    """One length of the window, and how much of it is measured."""

    tokens: int
    repeats: int
    slower_forms: tuple[str, ...] = ()
    """Those of `CHUNKED` and `NAIVE` that take part: they would take minutes at some lengths."""


FULL = (
    Length(512, 15, (CHUNKED, NAIVE)),
    Length(2048, 11, (CHUNKED,)),
    Length(16384, 5),
)
QUICK = (Length(128, 3, (CHUNKED, NAIVE)), Length(512, 3, (CHUNKED,)))


def run(lengths: tuple[Length, ...], announce: Announce) -> Findings:
    """Milliseconds of the forward pass, and of forward and backward.

    Raises:
        ValueError: the native kernel is not to be had here.
    """
    if (reason := kernels.available(HEAD_DIM)[1]) is not None:
        raise ValueError(f"there is no native kernel to measure: {reason}")
    findings = Findings()
    for length in lengths:
        case = f"T={length.tokens}"
        forms = peers(length)
        both = side_by_side(
            {name: forward_backward(*form) for name, form in forms.items()},
            repeats=length.repeats,
            announce=lambda text, case=case: announce(f"{case}, {text}"),  # type: ignore[misc]
        )
        findings.milliseconds(f"{case} forward+backward", both)
        gates = {
            SDPA: AGAINST_SDPA.get(length.tokens),
            CHUNKED: AGAINST_CHUNKED.get(length.tokens),
        }
        for name in both:
            if name not in (NATIVE, NATIVE_BF16):
                ours = NATIVE_BF16 if name == SDPA_BF16 else NATIVE
                pair = ((ours, both[ours]), (name, both[name]))
                findings.compare("forward+backward", case, *pair, gates.get(name))
        alone = side_by_side(
            {name: forward(*form) for name, form in forms.items()},
            repeats=length.repeats,
            announce=lambda text, case=case: announce(f"{case} forward, {text}"),  # type: ignore[misc]
        )
        findings.milliseconds(f"{case} forward", alone)
        findings.notes.append(_limit(length, both[NATIVE]))
    findings.notes.insert(0, f"One window (B = 1), {HEADS} heads of {HEAD_DIM}, causal attention.")
    return findings


def _limit(length: Length, native: Timing) -> str:
    """How far the native kernel is from the processor's limit."""
    per_element = wkv_op.FLOPS_PER_STATE_ELEMENT + wkv_op.BACKWARD_FLOPS_PER_STATE_ELEMENT
    flops = per_element * length.tokens * HEADS * HEAD_DIM**2
    rate = limits.of_matmul_peak(native.rate(flops).median, "fp32")
    return f"Limit: {NATIVE}, T={length.tokens}, forward+backward does {rate}."


Form = tuple[Callable[..., Tensor], list[Tensor]]
"""A function and its inputs, all of which want gradients."""


def peers(length: Length) -> dict[str, Form]:
    """Every form at one length."""
    inputs = wkv_inputs(length.tokens)
    forms: dict[str, Form] = {
        NATIVE: (lambda *x: kernels.wkv7(*x)[0], inputs),
        NATIVE_BF16: (lambda *x: kernels.wkv7(*x)[0], leaves(inputs, torch.bfloat16)),
        SDPA: (_attend, sdpa_inputs(length.tokens)),
        SDPA_BF16: (_attend, leaves(sdpa_inputs(length.tokens), torch.bfloat16)),
    }
    slower: dict[str, Form] = {
        CHUNKED: (lambda *x: kernels.wkv7_chunked(*x)[0], leaves(inputs)),
        NAIVE: (lambda *x: kernels.wkv7_naive(*x)[0], leaves(inputs)),
    }
    return {**forms, **{name: slower[name] for name in length.slower_forms}}


def wkv_inputs(tokens: int) -> list[Tensor]:
    """r, log_decay, k, v, a, b as an RWKV-7 layer makes them: [1, T, N, H]."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator)

    kk = F.normalize(normal(), dim=-1)
    log_decay = -math.exp(-0.5) * torch.sigmoid(normal())
    return leaves([normal(), log_decay, normal(), normal(), -kk, kk * torch.sigmoid(normal())])


def sdpa_inputs(tokens: int) -> list[Tensor]:
    """Queries, keys and values: [1, N, T, H]."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, tokens, HEAD_DIM)
    return leaves([torch.randn(shape, generator=generator) for _ in range(3)])


def leaves(tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Copies that want gradients."""
    return [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def forward_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    """Output and the gradients of every input."""

    def call() -> None:
        y = function(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return call


def forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    """The output alone, nothing saved for a backward pass."""

    def call() -> None:
        with torch.no_grad():
            function(*inputs)

    return call
