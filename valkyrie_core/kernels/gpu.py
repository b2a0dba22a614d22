"""WKV-7 on a CUDA device: the hand-off to flash-linear-attention's Triton kernels.

Its formula is ours (Peng et al. 2025, arXiv 2503.14456), its conventions are not: a state is
[key, value], documents lie end to end in one row whose bounds are `cu_seqlens`, and its chunk
kernels want one type for r, k, v, a and b, which is not fp32: they warn about it and are tested in
half precision. So fp32 goes to them as bf16, announced once, while log_decay keeps its type and
states are fp32. Its kernel per token computes in fp32 from any type, and has no backward pass.

Not used are its chunks of 64 (`lower_bound`, `safe_gate`): they invert by a Neumann series in fp16,
which loses most digits of a gradient where keys are correlated.

Shapes: B batch, T time, N heads, H head width, S documents of the batch.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from valkyrie_core.kernels.wkv import boundaries

HEAD_DIMS = range(16, 257)
"""What tensor cores multiply starts at 16; beyond 256 its kernels refuse."""
CHUNKED_FROM = 64
"""Tokens from which its chunk kernels beat one token after the other, by its own RWKV-7 layer."""

log = logging.getLogger("valkyrie")
_announced: set[str] = set()


@functools.cache
def why_not(head_dim: int) -> str | None:
    """None where flash-linear-attention serves heads of this width, else the reason."""
    if head_dim not in HEAD_DIMS:
        return f"flash-linear-attention has no kernel for a head of {head_dim}"
    try:
        _kernels()
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
    ) as error:  # so a broken Triton shows
        return (
            f"flash-linear-attention can't be imported ({error}); it comes with the extra gpu: "
            "pip install 'valkyrie-lab[gpu]'"
        )
    return None


def serves(r: Tensor) -> bool:
    """Whether `wkv7_fla` is the form for inputs like r; what goes slower instead is announced."""
    if r.device.type != "cuda" or r.dtype == torch.float64:
        return False
    return bool(_serves_width(r.shape[-1]))


def wkv7_fla(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    doc_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """WKV-7 by flash-linear-attention; arguments and results as in `wkv7`.

    The final state is a transposed view of what the kernel wrote, so that handing it back for the
    next token copies nothing.
    """
    B, T, N, H = r.shape
    dtype = r.dtype
    segments = None
    if doc_BT is not None:
        valid_BT, fresh_BT = boundaries(doc_BT, r)
        # padding is an identity: nothing decays, nothing is written, nothing is read
        padding = ~valid_BT[:, :, None, None]
        r, log_decay, k, a = (x.masked_fill(padding, 0) for x in (r, log_decay, k, a))
        segments = _segments(fresh_BT) if T > 1 else None
    kernel, inputs = _choose(T, [r, log_decay, k, v, a, b])
    start = None
    if state is not None:
        start = state.to(torch.promote_types(state.dtype, torch.float32)).mT
    if segments is not None:
        inputs = [x.reshape(1, B * T, N, H) for x in inputs]
        if start is not None:
            others = start.new_zeros(len(segments.bounds) - 1, N, H, H)
            start = others.index_copy(0, segments.first_B, start)
    y, final = kernel(
        **dict(zip(("r", "w", "k", "v", "a", "b"), inputs, strict=True)),
        scale=1.0,
        initial_state=None if start is None else start.contiguous(),
        output_final_state=True,
        cu_seqlens=None if segments is None else segments.bounds,
    )
    if segments is not None:
        final = final[segments.last_B]
    return y.reshape(B, T, N, H).to(dtype), final.mT


class _Segments(NamedTuple):
    """Where documents lie once the rows of a batch stand end to end."""

    bounds: Tensor
    """[S + 1]: the first token of each, and the number of tokens."""
    first_B: Tensor
    """The document that continues each row's state."""
    last_B: Tensor
    """The document that leaves each row's state."""


def _segments(fresh_BT: Tensor) -> _Segments:
    """A document starts with every row and at every fresh token; padding belongs to the last."""
    B, T = fresh_BT.shape
    row_BT = torch.arange(T, device=fresh_BT.device).eq(0).expand(B, T)
    starts = (fresh_BT | row_BT).flatten()
    order_BT = starts.cumsum(0).view(B, T) - 1
    bounds = F.pad(starts.nonzero().squeeze(1), (0, 1), value=B * T)
    return _Segments(bounds, order_BT[:, 0], order_BT[:, -1])


def _choose(T: int, inputs: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """(the kernel for T tokens, r, log_decay, k, v, a, b in the types that it takes)."""
    chunked, per_token = _kernels()
    r, log_decay, k, v, a, b = inputs
    if not torch.is_grad_enabled() and (T < CHUNKED_FROM or r.dtype == torch.float32):
        return per_token, inputs
    dtype = r.dtype
    if dtype == torch.float32:
        _announce(
            "WKV-7 trains in bf16 on this GPU: flash-linear-attention's chunk kernels are not made "
            "for fp32. Decays and states stay in fp32."
        )
        dtype = torch.bfloat16
    r, k, v, a, b = (x.to(dtype) for x in (r, k, v, a, b))
    return chunked, [r, log_decay, k, v, a, b]


def _kernels() -> tuple[Any, Any]:
    """(the chunk kernels, the kernel per token); the first import takes seconds."""
    from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7

    return chunk_rwkv7, fused_recurrent_rwkv7


def _serves_width(head_dim: int) -> bool:
    """Whether there are kernels; a compiled graph takes the answer as a constant."""
    reason = why_not(head_dim)
    if reason is not None:
        _announce(
            "WKV-7 runs in its chunked PyTorch form on this GPU: dozens of launches per layer and "
            "one more for every 32 tokens, where flash-linear-attention has fused kernels (by how "
            f"much slower has not been measured): {reason}"
        )
    return reason is None


# what torch.compiler.assume_constant_result does, after a second of importing the compiler
_serves_width._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        log.warning("%s", message)
