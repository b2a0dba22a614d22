"""WKV-7 as torch operators, so that compile, FLOP counting and checkpointing know it.

The operators run the native kernel. Shapes: B batch, T time, N heads, H head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from valkyrie_core.kernels import native
from valkyrie_core.kernels.guard import expect, once_differentiable

STRETCH = 32
"""Tokens between two saved states, as in the kernel's source."""
# per state element and token: decay 1, S a 2, two rank-1 updates 4, S r 2
FLOPS_PER_STATE_ELEMENT = 9
# the backward pass makes the states again and has two products for each of the forward's
BACKWARD_FLOPS_PER_STATE_ELEMENT = 3 * FLOPS_PER_STATE_ELEMENT


# `define` and `impl` rather than `custom_op`: that one imports torch's compiler, which takes a
# second, at the first call of every process
_library = torch.library.Library("valkyrie", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "wkv7(Tensor r, Tensor log_decay, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, "
    "Tensor? flags_BT, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(  # type: ignore[no-untyped-call]
    "wkv7_backward(Tensor r, Tensor log_decay, Tensor k, Tensor v, Tensor a, Tensor b, "
    "Tensor? flags_BT, Tensor sa, Tensor checkpoints, Tensor dy, Tensor d_final) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "wkv7", "CPU")
def _wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    flags_BT: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, final state, and with `save` two tensors for the backward pass, else empty ones)."""
    B, T, N, H = r.shape
    for name, x in (("log_decay", log_decay), ("k", k), ("v", v), ("a", a), ("b", b)):
        expect(name, x, r.shape)
    expect("the state", state, (B, N, H, H), torch.float32)
    expect("the documents", flags_BT, (B, T))
    return native.forward([r, log_decay, k, v, a, b], flags_BT, state, save)


@torch.library.register_fake("valkyrie::wkv7", lib=_library)  # type: ignore[untyped-decorator]
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    flags_BT: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, N, H = r.shape
    stretches = -(-T // STRETCH)
    empty = r.new_empty([0], dtype=torch.float32)
    sa = r.new_empty([B, T, N, H], dtype=torch.float32) if save else empty
    saved = r.new_empty([B, N, stretches, H, H], dtype=torch.float32) if save else empty
    final = r.new_empty([B, N, H, H], dtype=torch.float32)
    return torch.empty_like(r), final, sa, saved.clone()


@torch.library.impl(_library, "wkv7_backward", "CPU")
def _wkv7_backward(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    flags_BT: Tensor | None,
    sa: Tensor,
    checkpoints: Tensor,
    dy: Tensor,
    d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six inputs and of the initial state."""
    inputs = [r, log_decay, k, v, a, b]
    grads, d_state = native.backward(inputs, flags_BT, sa, checkpoints, dy, d_final)
    g = grads
    return g[0], g[1], g[2], g[3], g[4], g[5], d_state


@torch.library.register_fake("valkyrie::wkv7_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    flags_BT: Tensor | None,
    sa: Tensor,
    checkpoints: Tensor,
    dy: Tensor,
    d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    e = torch.empty_like
    return e(r), e(log_decay), e(k), e(v), e(a), e(b), e(d_final)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, log_decay, k, v, a, b, state, flags_BT, _ = inputs
    ctx.save_for_backward(r, log_decay, k, v, a, b, flags_BT, output[2], output[3])
    ctx.has_state = state is not None
    # else what is kept for the backward pass would be given gradients of zeros
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    *inputs, flags_BT, sa, checkpoints = ctx.saved_tensors
    r = inputs[0]
    if dy is None:
        dy = torch.zeros_like(r)
    if d_final is None:
        d_final = sa.new_zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3])
    out = wkv7_native_backward(
        *inputs, flags_BT, sa, checkpoints, dy.contiguous(), d_final.contiguous()
    )
    return (*out[:6], out[6] if ctx.has_state else None, None, None)


torch.library.register_autograd("valkyrie::wkv7", _backward, setup_context=_setup, lib=_library)
once_differentiable(_library, "valkyrie::wkv7_backward")
wkv7_native = torch.ops.valkyrie.wkv7.default
wkv7_native_backward = torch.ops.valkyrie.wkv7_backward.default


@register_flop_formula(torch.ops.valkyrie.wkv7)
def _forward_flops(r_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    B, T, N, H = r_shape
    return FLOPS_PER_STATE_ELEMENT * B * T * N * H * H


@register_flop_formula(torch.ops.valkyrie.wkv7_backward)
def _backward_flops(r_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    B, T, N, H = r_shape
    return BACKWARD_FLOPS_PER_STATE_ELEMENT * B * T * N * H * H
