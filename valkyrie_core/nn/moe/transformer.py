"""Experts that are small transformers: attention over the expert's own tokens, then a SwiGLU.

An expert sees the tokens that were sent to it, of the same document and no later than the one that
asks; the order among them is theirs in time, without positions. What it makes is added to the
stream by the layer, so its own residual path leaves the token itself out.

Shapes: B batch, T time, D model, R = B * T tokens, E experts, K slots of a token, M entries (a
token at one of its experts), L entries of a row, S those of a row with what was read before, N
heads, H head width, A = N * H.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.kernels import rows
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.kv_cache import PADDING, KVState
from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.masked_attention import sdpa, seen
from valkyrie_core.nn.moe.dispatch import Entries
from valkyrie_core.nn.moe.experts import MlpConfig, MlpExperts, grouped_linear
from valkyrie_core.nn.state import Ctx


class TransformerConfig(MlpConfig):
    """Every expert is a small pre-norm transformer block over its own tokens."""

    type: Literal["transformer"] = "transformer"  # type: ignore[assignment]
    num_heads: int = Field(default=2, ge=1)
    """Heads of an expert's attention."""
    head_dim: int = Field(default=16, ge=1)
    """Their width."""

    def build(self, dim: int, num_experts: int, slots: int) -> TransformerExperts:
        """The module this section describes."""
        return TransformerExperts(
            dim, num_experts, self.width(dim, slots), self.num_heads, self.head_dim
        )


class TransformerExperts(MlpExperts):
    """E blocks in stacked weights; the state is a cache whose `pos_BS` tells the expert."""

    roles: ClassVar[dict[str, Role]] = {
        **MlpExperts.roles,
        "query_EAD": "matrix",
        "key_EAD": "matrix",
        "value_EAD": "matrix",
        "output_EDA": "matrix",
    }

    def __init__(
        self, dim: int, num_experts: int, hidden_dim: int, num_heads: int, head_dim: int
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim)
        self.num_heads, self.head_dim = num_heads, head_dim
        width = num_heads * head_dim
        self.query_EAD = nn.Parameter(torch.empty(num_experts, width, dim))
        self.key_EAD = nn.Parameter(torch.empty(num_experts, width, dim))
        self.value_EAD = nn.Parameter(torch.empty(num_experts, width, dim))
        self.output_EDA = nn.Parameter(torch.zeros(num_experts, dim, width))
        self.attention_gain_ED = nn.Parameter(torch.ones(num_experts, dim))
        self.mlp_gain_ED = nn.Parameter(torch.ones(num_experts, dim))
        for weight in (*self.query_EAD, *self.key_EAD, *self.value_EAD):
            nn.init.orthogonal_(weight)

    def init_state(  # type: ignore[override]
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> KVState:
        """An empty cache."""
        return kv_cache.empty(batch_size, self.num_heads, self.head_dim, device, dtype)

    def forward(  # type: ignore[override]
        self, x_RD: Tensor, plan: Entries, state: KVState, ctx: Ctx
    ) -> tuple[Tensor, KVState]:
        """What every entry's expert makes of its token, the token itself left out: [M, D]."""
        x_MD = rows.spread(x_RD, plan.places_RK, sum(plan.sizes))
        normed_MD = self._normed(x_MD, self.attention_gain_ED, plan)
        mixed_MA, state = self._attend(normed_MD, plan, state, ctx)
        y_MD = grouped_linear(mixed_MA, self.output_EDA, plan.sizes).to(x_MD.dtype)
        hidden_MD = self._normed(x_MD + y_MD, self.mlp_gain_ED, plan)
        return y_MD + self.mlp(hidden_MD, plan), state

    def flops_per_entry(self, context_len: int, slots: int) -> int:
        """Forward operations; scores are computed for all entries and masked."""
        A, D = self.query_EAD.shape[1:]
        scores = 4 * A * context_len * slots
        return super().flops_per_entry(context_len, slots) + 2 * 4 * A * D + scores

    def repeated_per_entry(self, context_len: int, slots: int) -> int:
        """A fused backward pass makes the scores again: five products instead of four."""
        return 2 * self.query_EAD.shape[1] * context_len * slots

    def state_bytes(self, context_len: int, slots: int, value_bytes: int) -> int:
        """Keys and values of every entry, and of each its document and its expert."""
        per_entry = 2 * value_bytes * self.num_heads * self.head_dim + 2 * 8
        return context_len * slots * per_entry

    def _normed(self, x_MD: Tensor, gain_ED: Tensor, plan: Entries) -> Tensor:
        return F.rms_norm(x_MD, x_MD.shape[-1:]) * gain_ED.to(x_MD.dtype)[plan.experts_M]

    def _attend(
        self, x_MD: Tensor, plan: Entries, state: KVState, ctx: Ctx
    ) -> tuple[Tensor, KVState]:
        """[M, A]: every entry's view of its expert's tokens so far."""
        B, T = ctx.pos_BT.shape
        q_MA, k_MA, v_MA = (
            grouped_linear(x_MD, weight, plan.sizes)
            for weight in (self.query_EAD, self.key_EAD, self.value_EAD)
        )
        rows_M, times_M = plan.tokens_M // T, plan.tokens_M % T
        slots = int(plan.num_slots)
        place_M = times_M * slots + plan.slots_M
        index_M = rows_M * (T * slots) + place_M

        def laid_out(x_MA: Tensor) -> Tensor:
            flat = x_MA.new_zeros(B * T * slots, x_MA.shape[1]).index_copy(0, index_M, x_MA)
            return flat.view(B, T * slots, self.num_heads, self.head_dim).transpose(1, 2)

        segment_BT = ctx.segment_BT
        if ctx.valid_BT is not None:
            segment_BT = torch.where(ctx.valid_BT, segment_BT, PADDING)
        # a slot that is not used is padding
        segment_BL = torch.full((B * T * slots,), PADDING, device=x_MD.device)
        segment_BL[index_M] = segment_BT.flatten()[plan.tokens_M]
        expert_BL = torch.full((B * T * slots,), -1, device=x_MD.device)
        expert_BL[index_M] = plan.experts_M
        segment_BL, expert_BL = segment_BL.view(B, -1), expert_BL.view(B, -1)
        past = state.length
        new = kv_cache.append(state, laid_out(k_MA), laid_out(v_MA), segment_BL, expert_BL)
        mask_BLS = seen(segment_BL, new.segment_BS[:, : new.length], past)
        same_BLS = expert_BL[:, :, None] == new.pos_BS[:, None, : new.length]
        y_BNLH = sdpa(laid_out(q_MA), new, new.length, (mask_BLS & same_BLS)[:, None])
        return y_BNLH.transpose(1, 2).reshape(B * T * slots, -1)[index_M], new
