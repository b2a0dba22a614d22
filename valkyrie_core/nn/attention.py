"""Grouped-query attention with rotary positions and QK norm.

Ainslie et al. 2023 (arXiv 2305.13245), Su et al. 2021 (arXiv 2104.09864), Henry et al. 2020
(arXiv 2010.04245).

Shapes: B batch, T time of the window, S time of all keys, D model, N query heads, K key/value
heads, H head width, C half a head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.config import Config
from valkyrie_core.kernels.attention import blocked_attention, blocked_serves
from valkyrie_core.kernels.norm_rope import norm_rope, norm_rope_serves
from valkyrie_core.nn.state import Ctx

BLOCK = 256
"""Keys are stored in buffers that grow by at least this many tokens."""
PADDING = -1
"""The segment of a padding key: no query has it."""
Angles = tuple[Tensor, Tensor]
"""Cosines and sines [B, T, C] of every token, for C pairs of a head's channels."""


class RopeConfig(Config):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    type: Literal["rope"] = "rope"
    theta: float = Field(default=10_000.0, gt=1)
    """The longest wavelength, in tokens, over 2 pi."""


class NoPositionConfig(Config):
    """No positions: the order comes from recurrent layers below."""

    type: Literal["none"] = "none"


class AttentionConfig(Config):
    """Causal grouped-query attention: native in bf16 on a CPU, else through torch's SDPA."""

    type: Literal["attention"] = "attention"
    num_heads: int = Field(default=8, ge=1)
    """Query heads; `dim` must be a multiple of it."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads; must divide num_heads. Left out: as many as query heads."""
    position: RopeConfig | NoPositionConfig = Field(default=RopeConfig(), discriminator="type")
    """How positions enter."""

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> Attention:
        """The module this section describes."""
        return Attention(dim, self)


class HighWater:
    """How far a shared buffer is filled; a state behind the mark may not write to it."""

    def __init__(self, length: int) -> None:
        self.length = length


class KVState(NamedTuple):
    """Keys and values of the tokens so far: the first `length` places of buffers.

    The buffers may hold more than this state's own tokens: places past `length` belong to states
    that continue this one. They are only ever written past the mark, so a state stays a value.
    """

    k_BKSH: Tensor
    v_BKSH: Tensor
    segment_BS: Tensor
    length: int
    mark: HighWater


class Attention(nn.Module):
    """Causal attention inside documents; its state is the KV cache."""

    def __init__(self, dim: int, config: AttentionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = dim // config.num_heads
        self.theta = config.position.theta if isinstance(config.position, RopeConfig) else None
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim)
        self.key_norm = nn.RMSNorm(self.head_dim)
        for layer in (self.query, self.key, self.value):
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.output.weight)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> KVState:
        """An empty cache."""
        empty = torch.empty(
            batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype
        )
        segment = torch.empty(batch_size, 0, device=device, dtype=torch.int64)
        return KVState(empty, empty, segment, 0, HighWater(0))

    def forward(self, x_BTD: Tensor, state: KVState, ctx: Ctx) -> tuple[Tensor, KVState, Ctx]:
        """Attends to the tokens of the same document, itself included."""
        B, T, D = x_BTD.shape
        angles = None
        if self.theta is not None:
            angles = rope_angles(ctx.pos_BT, self.head_dim, self.theta, x_BTD.dtype)
        q_BNTH = self._placed(self.query(x_BTD), self.query_norm, angles, x_BTD.dtype)
        k_BKTH = self._placed(self.key(x_BTD), self.key_norm, angles, x_BTD.dtype)
        v_BKTH = self._heads(self.value(x_BTD))
        segment_BT = ctx.segment_BT
        if ctx.valid_BT is not None:
            segment_BT = torch.where(ctx.valid_BT, segment_BT, PADDING)
        new = append(state, k_BKTH, v_BKTH, segment_BT)
        if state.length == 0 and T > 1 and blocked_serves(q_BNTH):
            # never slower than SDPA where measured: with its gradients 10 ms against 30 at T = 512,
            # 60 against 112 at T = 4096 (4096 tokens, 5 heads of 64, two cores with AMX). The dense
            # mask of packed documents doubles SDPA's time; here what is hidden is skipped
            y_BTNH = blocked_attention(
                q_BNTH.transpose(1, 2),
                k_BKTH.transpose(1, 2),
                v_BKTH.transpose(1, 2),
                segment_BT if ctx.packed else None,
            )
        else:
            mask = None
            if state.length > 0 or ctx.packed:
                mask = _mask(segment_BT, new.segment_BS[:, : new.length], state.length)
            y_BTNH = self._sdpa(q_BNTH, new, mask).transpose(1, 2)
        return self.output(y_BTNH.reshape(B, T, D)), new, ctx

    def _placed(
        self, x_BTD: Tensor, norm: nn.RMSNorm, angles: Angles | None, dtype: torch.dtype
    ) -> Tensor:
        """Heads [B, N, T, H] of a projection, normed and turned, in the projection's type.

        `dtype` is that of the residual stream, in which norms are computed.
        """
        x_BTNH = x_BTD.view(*x_BTD.shape[:2], -1, self.head_dim)
        if dtype == torch.float32 and norm_rope_serves(x_BTNH, norm.weight):
            cos_BTC, sin_BTC = angles or (None, None)
            eps = norm.eps or torch.finfo(dtype).eps
            return norm_rope(x_BTNH, norm.weight, cos_BTC, sin_BTC, eps).transpose(1, 2)
        x_BNTH: Tensor = norm(x_BTNH.transpose(1, 2).to(dtype))
        if angles is not None:
            x_BNTH = turn(x_BNTH, angles)
        # autocast leaves the norms in fp32: queries and keys must agree with the values
        return x_BNTH.to(x_BTD.dtype)

    def _sdpa(self, q_BNTH: Tensor, cache: KVState, mask: Tensor | None) -> Tensor:
        """[B, N, T, H] by torch's own attention over all keys of the cache."""
        k_BKSH, v_BKSH = cache.k_BKSH[:, :, : cache.length], cache.v_BKSH[:, :, : cache.length]
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            k_BKSH = k_BKSH.repeat_interleave(groups, dim=1)
            v_BKSH = v_BKSH.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH.to(q_BNTH.dtype),
            v_BKSH.to(q_BNTH.dtype),
            attn_mask=mask,
            is_causal=mask is None and q_BNTH.shape[2] > 1,
        )

    def flops_per_token(self, context_len: int) -> int:
        """Forward operations per token, averaged over a causal window of context_len."""
        matrices = sum(
            layer.weight.numel() for layer in (self.query, self.key, self.value, self.output)
        )
        return 2 * matrices + 2 * context_len * self.num_heads * self.head_dim

    def _heads(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, -1, self.head_dim).transpose(1, 2)


def append(state: KVState, k_BKTH: Tensor, v_BKTH: Tensor, segment_BT: Tensor) -> KVState:
    """The cache with a window more; `state` stays as valid as it was.

    Writes in place only past the high-water mark of the shared buffers, and never under autograd.
    """
    T = k_BKTH.shape[2]
    length = state.length + T
    if torch.is_grad_enabled() and (k_BKTH.requires_grad or state.k_BKSH.requires_grad):
        if state.length:
            k_BKTH = torch.cat([state.k_BKSH[:, :, : state.length].to(k_BKTH), k_BKTH], dim=2)
            v_BKTH = torch.cat([state.v_BKSH[:, :, : state.length].to(v_BKTH), v_BKTH], dim=2)
            segment_BT = torch.cat([state.segment_BS[:, : state.length], segment_BT], dim=1)
        return KVState(k_BKTH, v_BKTH, segment_BT, length, HighWater(length))
    k_BKSH, v_BKSH, segment_BS, _, mark = state
    if length > k_BKSH.shape[2] or mark.length != state.length or k_BKSH.dtype != k_BKTH.dtype:
        # out of room, or another continuation has taken the place: move to buffers of our own
        room = -(-max(length, state.length * 3 // 2) // BLOCK) * BLOCK
        k_BKSH = _moved(k_BKSH.to(k_BKTH.dtype), state.length, room, dim=2)
        v_BKSH = _moved(v_BKSH.to(v_BKTH.dtype), state.length, room, dim=2)
        segment_BS = _moved(segment_BS, state.length, room, dim=1)
        mark = HighWater(state.length)
    k_BKSH[:, :, state.length : length] = k_BKTH
    v_BKSH[:, :, state.length : length] = v_BKTH
    segment_BS[:, state.length : length] = segment_BT
    mark.length = length
    return KVState(k_BKSH, v_BKSH, segment_BS, length, mark)


def _moved(buffer: Tensor, length: int, room: int, *, dim: int) -> Tensor:
    shape = list(buffer.shape)
    shape[dim] = room
    # zeros, not empty: a masked key must be finite, since 0 * NaN is NaN
    moved = buffer.new_zeros(shape)
    moved.narrow(dim, 0, length).copy_(buffer.narrow(dim, 0, length))
    return moved


def _mask(segment_BT: Tensor, segment_BS: Tensor, past: int) -> Tensor:
    """[B, 1, T, S]: the same document, not later; padding sees itself, so that no row is empty."""
    T, S = segment_BT.shape[1], segment_BS.shape[1]
    t_T1 = torch.arange(T, device=segment_BT.device)[:, None] + past
    s_S = torch.arange(S, device=segment_BT.device)
    same_BTS = segment_BT[:, :, None] == segment_BS[:, None, :]
    real_BT1 = (segment_BT != PADDING)[:, :, None]
    seen_BTS = (same_BTS & real_BT1 & (s_S <= t_T1)) | (s_S == t_T1)
    return seen_BTS[:, None]


def rope_angles(pos_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Angles:
    """Cosines and sines [B, T, C] of the angles of C = head_dim / 2 pairs, in fp32 or better."""
    precise = torch.promote_types(dtype, torch.float32)
    half = head_dim // 2
    pair_C = torch.arange(half, device=pos_BT.device, dtype=precise)
    angle_BTC = pos_BT[..., None] * theta ** (-pair_C / half)
    return angle_BTC.cos(), angle_BTC.sin()


def turn(x_BNTH: Tensor, angles: Angles) -> Tensor:
    """Rotary positions, halves paired: the first half of a head with the second."""
    cos, sin = (x_BTC[:, None] for x_BTC in angles)
    half = cos.shape[-1]
    x1, x2, rest = x_BNTH[..., :half], x_BNTH[..., half : 2 * half], x_BNTH[..., 2 * half :]
    turned = [x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest]
    return torch.cat(turned, dim=-1).to(x_BNTH.dtype)
