"""WKV-7, the recurrence of RWKV-7, in plain torch: a twin per token and a chunked matmul form.

    S_t = S_{t-1} (diag(exp(log_decay_t)) + a_t b_t^T) + v_t k_t^T        y_t = S_t r_t

(Peng et al. 2025, arXiv 2503.14456; RWKV-7 has a = -kk and b = kk * in-context rate; there is no
1/sqrt(H) scale.) The state is [value, key].

Shapes: B batch, T time, N heads, H head width, C tokens of a chunk, M = B * N * chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 32
"""Tokens of a chunk: 32 measured fastest of 16, 32 and 64 on a CPU."""
LOWEST_LOG_DECAY = -1.0
"""exp(-32 * log_decay) must stay far inside fp32; RWKV-7 keeps log_decay above -0.6066."""


def wkv7_naive(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    doc_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The slow twin: the formula, one token after the other.

    Arguments and results as in `wkv7`.
    """
    B, T, N, H = r.shape
    S = r.new_zeros(B, N, H, H) if state is None else state
    valid_BT, fresh_BT = boundaries(doc_BT, r) if doc_BT is not None else (None, None)
    ys = []
    for t in range(T):
        before = S
        if fresh_BT is not None:
            S = torch.where(fresh_BT[:, t, None, None, None], torch.zeros_like(S), S)
        Sa = (S @ a[:, t, :, :, None]).squeeze(-1)
        S = (
            S * log_decay[:, t, :, None, :].exp()
            + Sa[..., :, None] * b[:, t, :, None, :]
            + v[:, t, :, :, None] * k[:, t, :, None, :]
        )
        y = (S @ r[:, t, :, :, None]).squeeze(-1)
        if valid_BT is not None:
            keep = valid_BT[:, t, None, None]
            S = torch.where(keep[..., None], S, before)
            y = torch.where(keep, y, torch.zeros_like(y))
        ys.append(y)
    return torch.stack(ys, dim=1), S


def wkv7_chunked(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    doc_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked form: matrix products inside chunks of 32, one product per chunk between them.

    Inside a chunk the products of decays are exp(cumsum), their inverses exp(-cumsum), and the
    delta rule's mutual dependence is one triangular solve (a Neumann series turns to garbage for
    correlated keys). Arguments and results as in `wkv7`; computes in fp32, or in fp64 where the
    inputs are fp64.
    """
    B, T, N, H = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    r, log_decay, k, v, a, b = (x.to(dtype) for x in (r, log_decay, k, v, a, b))
    valid_BT, fresh_BT = boundaries(doc_BT, r) if doc_BT is not None else (None, None)
    if valid_BT is not None:
        # padding is an identity: nothing decays, nothing is written, nothing is read
        keep = valid_BT[:, :, None, None].to(dtype)
        r, log_decay, k, a = r * keep, log_decay * keep, k * keep, a * keep
    C = min(CHUNK, T)
    chunks = -(-T // C)
    missing = chunks * C - T

    def split(x_BTNH: Tensor) -> Tensor:
        if missing:
            x_BTNH = torch.nn.functional.pad(x_BTNH, (0, 0, 0, 0, 0, missing))
        return x_BTNH.view(B, chunks, C, N, H).permute(0, 3, 1, 2, 4).reshape(-1, C, H)

    r, log_decay, k, v, a, b = (split(x) for x in (r, log_decay, k, v, a, b))
    G = log_decay.cumsum(1)
    grow, shrink = G.exp(), (-G).exp()
    to_end = (G[:, -1:] - G).exp()
    Ad, Rd = a * (G - log_decay).exp(), r * grow
    Kd, Bd = k * shrink, b * shrink
    Kb, Bb = k * to_end, b * to_end
    end = grow[:, -1]
    lower = torch.ones(C, C, dtype=dtype, device=r.device).tril()
    strict = lower.tril(-1)
    A_ab = (Ad @ Bd.mT) * strict
    A_ak = (Ad @ Kd.mT) * strict
    A_rb = (Rd @ Bd.mT) * lower
    A_rk = (Rd @ Kd.mT) * lower
    A_in, R_in = Ad, Rd
    if fresh_BT is not None:
        segment = _segments(fresh_BT, chunks, C, missing, N)
        same = (segment[:, :, None] == segment[:, None, :]).to(dtype)
        A_ab, A_ak, A_rb, A_rk = (x * same for x in (A_ab, A_ak, A_rb, A_rk))
        first = (segment == 0).to(dtype)[..., None]
        last = (segment == segment[:, -1:]).to(dtype)[..., None]
        A_in, R_in, Kb, Bb = A_in * first, R_in * first, Kb * last, Bb * last
        end = end * first[:, -1]
    eye = torch.eye(C, dtype=dtype, device=r.device)
    # one solve for what depends on the chunk alone (U) and for what the state brings in (W)
    solved = torch.linalg.solve_triangular(
        eye - A_ab, torch.cat([A_ak @ v, A_in], dim=2), upper=False, unitriangular=True
    )
    U, W = solved[..., :H], solved[..., H:]
    P = torch.diag_embed(end) + Bb.mT @ W
    Q = Kb.mT @ v + Bb.mT @ U
    O_own = A_rk @ v + A_rb @ U
    O_in = R_in + A_rb @ W
    start = r.new_zeros(B * N, H, H) if state is None else state.to(dtype).reshape(-1, H, H).mT
    starts, final = _Scan.apply(  # type: ignore[no-untyped-call]
        P.view(-1, chunks, H, H), Q.view(-1, chunks, H, H), start
    )
    y = O_own + O_in @ starts.reshape(-1, H, H)
    y_BTNH = y.view(B, N, chunks, C, H).permute(0, 2, 3, 1, 4).reshape(B, chunks * C, N, H)
    return y_BTNH[:, :T], final.mT.reshape(B, N, H, H)


class _Scan(torch.autograd.Function):
    """M_{n+1} = P_n M_n + Q_n over the chunks: every M_n before its chunk, and the last."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, Q: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        chunks = P.shape[1]
        states = Q.new_empty(chunks + 1, *start.shape)
        states[0] = start
        for n in range(chunks):
            torch.baddbmm(Q[:, n], P[:, n], states[n], out=states[n + 1])
        ctx.save_for_backward(P, states)
        return states[:chunks].transpose(0, 1).contiguous(), states[chunks].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_states, d_final = grads
        P, states = ctx.saved_tensors
        chunks = P.shape[1]
        gradient = torch.empty_like(states)
        gradient[chunks] = d_final
        for n in range(chunks - 1, -1, -1):
            torch.baddbmm(d_states[:, n], P[:, n].mT, gradient[n + 1], out=gradient[n])
        dP = gradient[1:] @ states[:-1].mT
        return dP.transpose(0, 1), gradient[1:].transpose(0, 1), gradient[0]


def boundaries(doc_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(which tokens are no padding, which start a document inside the window)."""
    valid_BT = doc_BT >= 0
    T = doc_BT.shape[1]
    time = torch.arange(T, device=like.device).expand_as(doc_BT)
    latest = torch.where(valid_BT, time, -1).cummax(dim=1).values
    filled = doc_BT.gather(1, latest.clamp(min=0))
    # the first real token continues the state: whose document that is, the caller knows
    changed = (filled[:, 1:] != filled[:, :-1]) & (latest[:, :-1] >= 0)
    fresh_BT = torch.nn.functional.pad(changed & valid_BT[:, 1:], (1, 0), value=False)
    return valid_BT, fresh_BT


def flags(doc_BT: Tensor, like: Tensor) -> Tensor:
    """[B, T] uint8 as the native kernel reads documents: 1 starts one, 2 is padding, else 0."""
    valid_BT, fresh_BT = boundaries(doc_BT, like)
    return torch.where(valid_BT, fresh_BT.to(torch.uint8), 2).contiguous()


def _segments(fresh_BT: Tensor, chunks: int, C: int, missing: int, N: int) -> Tensor:
    """[M, C]: how many documents have started inside the chunk up to each token."""
    B = fresh_BT.shape[0]
    fresh = torch.nn.functional.pad(fresh_BT, (0, missing), value=False)
    segment = fresh.view(B, 1, chunks, C).cumsum(-1)
    return segment.expand(B, N, chunks, C).reshape(-1, C)
