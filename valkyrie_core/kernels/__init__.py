"""The WKV-7 recurrence, by the fastest form that this machine has."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from valkyrie_core.kernels import build, gpu, native
from valkyrie_core.kernels.guard import expect
from valkyrie_core.kernels.wkv import LOWEST_LOG_DECAY, flags, wkv7_chunked, wkv7_naive
from valkyrie_core.kernels.wkv_op import wkv7_native

__all__ = ["available", "wkv7", "wkv7_chunked", "wkv7_naive"]

log = logging.getLogger("valkyrie")
_announced: set[str] = set()


def available(head_dim: int = 64) -> tuple[str, str | None]:
    """(the form that serves heads of this width on the CPU, why it is not the native one)."""
    reason = native.why_not(head_dim)
    return ("native", None) if reason is None else ("chunked", reason)


def wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    doc_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """WKV-7 over a window of tokens.

    Args:
        r, log_decay, k, v, a, b: [B, T, N, H]; log_decay in [-1, 0], T at least 1.
        state: [B, N, H, H] as [value, key], in fp32; zeros if left out.
        doc_BT: document ids; a change resets the state, -1 is padding (an identity, y = 0). The
            first token always continues `state`.

    Returns:
        y [B, T, N, H] in the dtype of r, and the state after the last token.

    Raises:
        ValueError: log_decay outside of [-1, 0] (below, the chunked form would overflow), no
            token, or a tensor of another shape.
    """
    # a compiled graph can't look at values; RWKV-7 keeps the bound by construction
    if not torch.compiler.is_compiling() and log_decay.numel():
        lowest, highest = (float(x) for x in log_decay.detach().aminmax())
        if lowest < LOWEST_LOG_DECAY or highest > 0:
            raise ValueError(
                f"log_decay is within [{LOWEST_LOG_DECAY:g}, 0], not [{lowest:g}, {highest:g}]"
            )
    _check_shapes(r, {"log_decay": log_decay, "k": k, "v": v, "a": a, "b": b}, state, doc_BT)
    with torch.autocast(r.device.type, enabled=False):
        if _native_serves(r):
            return _native(r, log_decay, k, v, a, b, state, doc_BT)
        if gpu.serves(r):
            return gpu.wkv7_fla(r, log_decay, k, v, a, b, state, doc_BT)
        if r.shape[1] == 1 and not torch.is_grad_enabled():
            precise = torch.promote_types(r.dtype, torch.float32)
            r_, log_decay, k, v, a, b = (x.to(precise) for x in (r, log_decay, k, v, a, b))
            y, state = wkv7_naive(r_, log_decay, k, v, a, b, state, doc_BT)
        else:
            y, state = wkv7_chunked(r, log_decay, k, v, a, b, state, doc_BT)
    return y.to(r.dtype), state


def _check_shapes(
    r: Tensor, others: dict[str, Tensor], state: Tensor | None, doc_BT: Tensor | None
) -> None:
    B, T, N, H = r.shape
    if T == 0:
        raise ValueError("a window has at least one token")
    for name, x in others.items():
        expect(name, x, r.shape)
    expect("the state", state, (B, N, H, H))
    expect("doc_BT", doc_BT, (B, T))


def _native_serves(r: Tensor) -> bool:
    if r.device.type != "cpu" or r.dtype == torch.float64:
        return False
    return bool(native_serves_width(r.shape[-1]))


def native_serves_width(head_dim: int) -> bool:
    """Whether the kernel can be had; a compiled graph takes the answer as a constant."""
    reason = native.why_not(head_dim)
    if reason is None:
        return True
    if reason not in _announced:
        _announced.add(reason)
        log.warning(
            "WKV-7 runs in its chunked PyTorch form, several times slower than the native kernel: "
            "%s",
            reason,
        )
    return False


# what torch.compiler.assume_constant_result does, after a second of importing the compiler
native_serves_width._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _native(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    doc_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = [
        (x if x.dtype in build.DTYPES else x.float()).contiguous()
        for x in (r, log_decay, k, v, a, b)
    ]
    flags_BT = None if doc_BT is None else flags(doc_BT, r)
    if state is not None:
        state = state.float().contiguous()
    grad = torch.is_grad_enabled()
    save = grad and any(x.requires_grad for x in (*inputs, *([state] if state is not None else [])))
    y, final, _, _ = wkv7_native(*inputs, state, flags_BT, save)
    return y.to(r.dtype), final
