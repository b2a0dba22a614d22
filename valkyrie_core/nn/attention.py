"""Grouped-query attention with QK norm, positions (`position.py`), and optionally a window.

Ainslie et al. 2023 (arXiv 2305.13245), Henry et al. 2020 (arXiv 2010.04245); windows keep attention
sinks as StreamingLLM does (Xiao et al. 2023, arXiv 2309.17453).

Shapes: B batch, T time of the window, S time of all keys, D model, N query heads, K key/value
heads, G query heads per key head, H head width, C half a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from valkyrie_core.config import Config
from valkyrie_core.kernels.attention import blocked_attention, blocked_serves
from valkyrie_core.kernels.norm_rope import norm_rope, norm_rope_serves
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.kv_cache import PADDING, KVState
from valkyrie_core.nn.masked_attention import (
    Normalizer,
    Sight,
    attend,
    bidirectional,
    sdpa,
    seen,
)
from valkyrie_core.nn.position import (
    Angles,
    PositionConfig,
    RopeConfig,
    YarnConfig,
    rope_angles,
    rotation,
    slopes,
    turn,
)
from valkyrie_core.nn.state import Cost, Ctx


class AttentionConfig(Config):
    """Causal grouped-query attention: native in bf16 on a CPU, else through torch's SDPA."""

    type: Literal["attention"] = "attention"
    num_heads: int = Field(default=8, ge=1)
    """Query heads; `dim` must be a multiple of it."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads; must divide num_heads. Left out: as many as query heads."""
    position: PositionConfig = RopeConfig()
    """How positions enter."""
    window: int | None = Field(default=None, ge=1)
    """A token sees only so many last tokens, itself included; left out: all of its document."""
    sinks: int = Field(default=4, ge=0)
    """With a window: so many first tokens of a document stay in sight, as if just before it."""
    normalizer: Normalizer = "softmax"
    """What makes weights of scores. sparsemax gives exact zeros (arXiv 1602.02068); its scores
    exist one by one, which takes more memory and time."""

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> Attention:
        """The module this section describes."""
        return Attention(dim, self)


class Attention(nn.Module):
    """Causal attention inside documents; its state is the KV cache."""

    def __init__(self, dim: int, config: AttentionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = dim // config.num_heads
        self.position = config.position
        self.window = config.window
        self.sinks = config.sinks if config.window is not None else 0
        self.normalizer = config.normalizer
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim)
        self.key_norm = nn.RMSNorm(self.head_dim)
        self.slopes = slopes(self.position, self.num_heads)
        for layer in (self.query, self.key, self.value):
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.output.weight)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> KVState:
        """An empty cache."""
        return kv_cache.empty(batch_size, self.num_kv_heads, self.head_dim, device, dtype)

    def forward(self, x_BTD: Tensor, state: KVState, ctx: Ctx) -> tuple[Tensor, KVState, Ctx]:
        """Attends to the tokens of the same document, itself included."""
        B, T, D = x_BTD.shape
        angles = self._angles(ctx.pos_BT, x_BTD.dtype)
        query_BTD = self.query(x_BTD)
        q_BNTH = self._placed(query_BTD, self.query_norm, angles, x_BTD.dtype)
        k_BKTH = self._placed(self.key(x_BTD), self.key_norm, angles, x_BTD.dtype)
        v_BKTH = self._heads(self.value(x_BTD))
        if not ctx.causal:
            y_BNTH = bidirectional(q_BNTH, k_BKTH, v_BKTH, self.normalizer)
            y_BTNH = y_BNTH.transpose(1, 2)
            return self.output(y_BTNH.reshape(B, T, D)), state, ctx
        segment_BT = ctx.segment_BT
        if ctx.valid_BT is not None:
            segment_BT = torch.where(ctx.valid_BT, segment_BT, PADDING)
        past = self.trimmed(state, ctx)
        new = kv_cache.append(past, k_BKTH, v_BKTH, segment_BT, ctx.pos_BT)
        if not self._is_plain(past, T, ctx):
            sink_q_BNTH = None
            if angles is not None and self.window is not None and self._slides(past, T, ctx):
                # a sink that is far away is turned as if it were just before the window
                clamped_BT = ctx.pos_BT.clamp(max=self.window + self.sinks - 1)
                near = self._angles(clamped_BT, x_BTD.dtype)
                sink_q_BNTH = self._placed(query_BTD, self.query_norm, near, x_BTD.dtype)
            y_BNTH = attend(self._sight, q_BNTH, sink_q_BNTH, ctx.pos_BT, segment_BT, new)
            y_BTNH = y_BNTH.transpose(1, 2)
        elif past.length == 0 and T > 1 and blocked_serves(q_BNTH):
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
            if past.length > 0 or ctx.packed:
                mask = seen(segment_BT, new.segment_BS[:, : new.length], past.length)[:, None]
            y_BTNH = sdpa(q_BNTH, new, new.length, mask).transpose(1, 2)
        return self.output(y_BTNH.reshape(B, T, D)), new, ctx

    def stretch(self, factor: float, trained_context: int) -> bool:
        """Turns rotary positions into YaRN's, in place; False where there are none to turn."""
        if not isinstance(self.position, RopeConfig):
            return False
        theta = self.position.theta
        self.position = YarnConfig(theta=theta, factor=factor, trained_context=trained_context)
        return True

    def limit(self, window: int, sinks: int) -> bool:
        """Sees so many last tokens only, from now on; False where it does so already."""
        if self.window is not None and self.window <= window:
            return False
        self.window, self.sinks = window, sinks if self.window is None else self.sinks
        return True

    def trimmed(self, state: KVState, ctx: Ctx) -> KVState:
        """The cache without what no token from `ctx` on sees."""
        if self.window is None:
            return state
        return kv_cache.trim(state, ctx.segment_BT[:, 0], ctx.pos_BT[:, 0], self.window, self.sinks)

    def settled(self, state: KVState, segment_B: Tensor, pos_B: Tensor) -> KVState:
        """The cache with nothing but what the next token sees; worth it where it is kept.

        Args:
            segment_B, pos_B: of the next token of each row.
        """
        if self.window is None:
            return state
        return kv_cache.trim(state, segment_B, pos_B, self.window, self.sinks, at_once=1)

    @property
    def _sight(self) -> Sight:
        return Sight(self.window, self.sinks, self.slopes, self.normalizer)

    def _is_plain(self, past: KVState, num_tokens: int, ctx: Ctx) -> bool:
        """Whether every earlier token of a document is seen, and all by the same rule."""
        return self._sight.is_plain and not self._slides(past, num_tokens, ctx)

    def _slides(self, past: KVState, num_tokens: int, ctx: Ctx) -> bool:
        """Whether some token may be further away than the window."""
        if self.window is None:
            return False
        # so few keys are near each other, unless some between them were never written
        return ctx.gaps or past.length + num_tokens > self.window

    def _angles(self, pos_BT: Tensor, dtype: torch.dtype) -> Angles | None:
        turning = rotation(self.position, self.head_dim, dtype)
        return None if turning is None else rope_angles(pos_BT, turning)

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

    def cost(self, context_len: int, value_bytes: int = 4, *, causal: bool = True) -> Cost:
        """Matrices, and scores and values for every key that is computed with."""
        matrices = 2 * sum(
            layer.weight.numel() for layer in (self.query, self.key, self.value, self.output)
        )
        per_key = 4 * self.num_heads * self.head_dim
        seen = context_len
        if self.window is not None:
            seen = min(self.window + self.sinks, context_len)
        # keys and values, and of every key its segment and its position
        key_bytes = 2 * value_bytes * self.num_kv_heads * self.head_dim + 2 * 8
        slides = self._sight.slides(context_len)
        # where sinks are turned otherwise than the rest, all keys are scored for either
        twice = slides and rotation(self.position, 2, torch.float32) is not None
        computed = per_key * 3 // 2 if twice else per_key
        pairs = self._sight.computed_pairs(context_len) if causal else context_len**2
        scores = computed * pairs // context_len
        # a fused backward pass makes the scores again: five products instead of four
        again = 0 if slides or self.normalizer != "softmax" else scores // 2
        return Cost(
            flops_per_token=matrices + scores,
            training_flops=3 * (matrices + scores) + again,
            decode_flops=matrices + per_key * seen,
            state_bytes=key_bytes * seen,
        )

    def _heads(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, -1, self.head_dim).transpose(1, 2)
