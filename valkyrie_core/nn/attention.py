"""Grouped-query attention with rotary positions and QK norm.

Ainslie et al. 2023 (arXiv 2305.13245), Su et al. 2021 (arXiv 2104.09864), Henry et al. 2020
(arXiv 2010.04245).

Shapes: B batch, T time of the window, S time of all keys, D model, N query heads, K key/value
heads, H head width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.config import Config
from valkyrie_core.nn.state import Ctx

BLOCK = 256
"""Keys are stored in buffers that grow by at least this many tokens."""
PADDING = -1
"""The segment of a padding key: no query has it."""


class RopeConfig(Config):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    type: Literal["rope"] = "rope"
    theta: float = Field(default=10_000.0, gt=1)
    """The longest wavelength, in tokens, over 2 pi."""


class NoPositionConfig(Config):
    """No positions: the order comes from recurrent layers below."""

    type: Literal["none"] = "none"


class AttentionConfig(Config):
    """Causal grouped-query attention through torch's scaled_dot_product_attention."""

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
        q_BNTH = self.query_norm(self._heads(self.query(x_BTD)).to(x_BTD.dtype))
        k_BKTH = self.key_norm(self._heads(self.key(x_BTD)).to(x_BTD.dtype))
        v_BKTH = self._heads(self.value(x_BTD))
        if self.theta is not None:
            q_BNTH, k_BKTH = rotate(q_BNTH, k_BKTH, ctx.pos_BT, self.theta)
        # autocast leaves the norms in fp32: all three must agree before SDPA
        q_BNTH, k_BKTH = q_BNTH.to(v_BKTH.dtype), k_BKTH.to(v_BKTH.dtype)
        segment_BT = ctx.segment_BT
        if ctx.valid_BT is not None:
            segment_BT = torch.where(ctx.valid_BT, segment_BT, PADDING)
        new = append(state, k_BKTH, v_BKTH, segment_BT)
        k_BKSH, v_BKSH = new.k_BKSH[:, :, : new.length], new.v_BKSH[:, :, : new.length]
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            k_BKSH = k_BKSH.repeat_interleave(groups, dim=1)
            v_BKSH = v_BKSH.repeat_interleave(groups, dim=1)
        mask = None
        if state.length > 0 or ctx.packed:
            mask = _mask(segment_BT, new.segment_BS[:, : new.length], state.length)
        y_BNTH = F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH.to(q_BNTH.dtype),
            v_BKSH.to(q_BNTH.dtype),
            attn_mask=mask,
            is_causal=mask is None and T > 1,
        )
        return self.output(y_BNTH.transpose(1, 2).reshape(B, T, D)), new, ctx

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


def rotate(q_BNTH: Tensor, k_BKTH: Tensor, pos_BT: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Rotary positions, halves paired (first half with second half), angles in fp32 or better."""
    H = q_BNTH.shape[-1]
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    half = torch.arange(H // 2, device=q_BNTH.device, dtype=dtype)
    angle_B1TH = pos_BT[:, None, :, None] * theta ** (-half / (H // 2))
    cos, sin = angle_B1TH.cos(), angle_B1TH.sin()
    return _turn(q_BNTH, cos, sin), _turn(k_BKTH, cos, sin)


def _turn(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x1, x2, rest = x_BNTH[..., :half], x_BNTH[..., half : 2 * half], x_BNTH[..., 2 * half :]
    turned = [x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest]
    return torch.cat(turned, dim=-1).to(x_BNTH.dtype)
