"""The WKV-7 recurrence, by the fastest form that this machine has."""

from __future__ import annotations

import torch
from torch import Tensor

from valkyrie_core.kernels.wkv import LOWEST_LOG_DECAY, wkv7_chunked, wkv7_naive

__all__ = ["wkv7", "wkv7_chunked", "wkv7_naive"]


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
        r, log_decay, k, v, a, b: [B, T, N, H]; log_decay in [-1, 0].
        state: [B, N, H, H] as [value, key], in fp32; zeros if left out.
        doc_BT: document ids; a change resets the state, -1 is padding (an identity, y = 0). The
            first token always continues `state`.

    Returns:
        y [B, T, N, H] in the dtype of r, and the state after the last token.

    Raises:
        ValueError: log_decay below -1 (the chunked form would overflow).
    """
    lowest_is_known = torch.compiler.is_compiling()
    if not lowest_is_known and float(log_decay.detach().amin()) < LOWEST_LOG_DECAY:
        raise ValueError(f"log_decay below {LOWEST_LOG_DECAY} would overflow the chunked form")
    with torch.autocast(r.device.type, enabled=False):
        if r.shape[1] == 1 and not torch.is_grad_enabled():
            precise = torch.promote_types(r.dtype, torch.float32)
            r_, log_decay, k, v, a, b = (x.to(precise) for x in (r, log_decay, k, v, a, b))
            y, state = wkv7_naive(r_, log_decay, k, v, a, b, state, doc_BT)
        else:
            y, state = wkv7_chunked(r, log_decay, k, v, a, b, state, doc_BT)
    return y.to(r.dtype), state
