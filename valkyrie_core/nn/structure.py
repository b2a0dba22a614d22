"""Messages between the summaries of chunks: a layer that works on a text's coarse structure.

A chunk's node begins as the mean of its tokens. In every round each node reads those before it and
itself, by attention, and adds what it read. A token then reads the nodes of the complete chunks of
its document, or nothing at all: a message of zeros is always among them. Chunks are complete groups
of tokens, so nothing comes from the future (two levels, as in Block-Recurrent and Hierarchical
transformers: arXiv 2203.07852, 2110.13711; here both are causal token by token).

Shapes: B batch, T time, D model, G chunks that a window completes at most, N heads, S chunks so
far, H head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.config import Config
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.attention import Attention, AttentionConfig
from valkyrie_core.nn.groups import Groups, find_groups
from valkyrie_core.nn.kv_cache import PADDING, KVState
from valkyrie_core.nn.position import NoPositionConfig
from valkyrie_core.nn.state import Cost, Ctx


class StructureConfig(Config):
    """Messages between the summaries of chunks, which tokens read."""

    type: Literal["structure"] = "structure"
    chunk_len: int = Field(default=16, ge=2)
    """Tokens of a chunk."""
    num_heads: int = Field(default=8, ge=1)
    """Of messages and of reading; `dim` must be a multiple of it."""
    rounds: int = Field(default=1, ge=0)
    """How often messages are passed, each time with weights of its own."""

    @property
    def attention(self) -> AttentionConfig:
        """That passes messages: what stands where is known from the tokens alone."""
        return AttentionConfig(num_heads=self.num_heads, position=NoPositionConfig())

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> Structure:
        """The module this section describes."""
        return Structure(dim, self)


class Structure(nn.Module):
    """Nodes of chunks and their readers; its state grows by the chunk."""

    def __init__(self, dim: int, config: StructureConfig) -> None:
        super().__init__()
        self.dim = dim
        self.chunk_len = config.chunk_len
        self.num_heads = config.num_heads
        self.head_dim = dim // config.num_heads
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(config.rounds))
        self.messages = nn.ModuleList(Attention(dim, config.attention) for _ in self.norms)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim)
        self.key_norm = nn.RMSNorm(self.head_dim)
        for layer in (self.query, self.key, self.value):
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.output.weight)

    @property
    def each(self) -> list[Attention]:
        """What passes messages, the first round first."""
        return list(self.messages)  # type: ignore[arg-type]

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """Tokens read, the sums of open chunks, the rounds' caches and that of the readers."""
        precise = torch.promote_types(dtype, torch.float32)
        return (
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.zeros(batch_size, self.dim, device=device, dtype=precise),
            tuple(m.init_state(batch_size, device=device, dtype=dtype) for m in self.each),
            kv_cache.empty(batch_size, self.num_heads, self.head_dim, device, dtype),
        )

    def forward(
        self, x_BTD: Tensor, state: tuple[Any, ...], ctx: Ctx
    ) -> tuple[Tensor, tuple[Any, ...], Ctx]:
        """Makes the nodes of the chunks that a window completes, and lets its tokens read."""
        read_B, open_BD, passed, known = state
        past = known.length
        groups = find_groups(read_B, ctx, self.chunk_len)
        node_BGD, open_BD = groups.summaries(x_BTD, open_BD)
        # decoding: most tokens complete no chunk
        if x_BTD.shape[1] > 1 or bool(groups.real_BG.any()):
            node_BGD, passed = self._passed(node_BGD, passed, groups.context(ctx))
            known = self._known(node_BGD, known, groups, ctx)
        y_BTD = self._read(x_BTD, known, past, groups, ctx)
        return self.output(y_BTD), (groups.read_B, open_BD, passed, known), ctx

    def _passed(
        self, node_BGD: Tensor, states: tuple[KVState, ...], ctx: Ctx
    ) -> tuple[Tensor, tuple[KVState, ...]]:
        after = []
        for norm, messages, own in zip(self.norms, self.each, states, strict=True):
            message_BGD, own, _ = messages(norm(node_BGD), own, ctx)
            node_BGD = node_BGD + message_BGD
            after.append(own)
        return node_BGD, tuple(after)

    def _known(self, node_BGD: Tensor, known: KVState, groups: Groups, ctx: Ctx) -> KVState:
        """The readers' cache with new nodes; those that are none have the segment of padding."""
        k_BNGH = self._normed(self.key(node_BGD), self.key_norm, node_BGD.dtype)
        v_BNGH = self._heads(self.value(node_BGD))
        segment_BG = ctx.segment_BT.gather(1, groups.end_BG).masked_fill(~groups.real_BG, PADDING)
        pos_BG = groups.rank_BT.gather(1, groups.end_BG) // self.chunk_len
        return kv_cache.append(known, k_BNGH, v_BNGH, segment_BG, pos_BG)

    def _read(self, x_BTD: Tensor, known: KVState, past: int, groups: Groups, ctx: Ctx) -> Tensor:
        B, T, D = x_BTD.shape
        q_BNTH = self._normed(self.query(x_BTD), self.query_norm, x_BTD.dtype)
        S = known.length
        k_BNSH, v_BNSH = (
            # the message of zeros comes first
            F.pad(part[:, :, :S].to(q_BNTH.dtype), (0, 0, 1, 0))
            for part in (known.k_BKSH, known.v_BKSH)
        )
        # a row's nodes of a window come first in what it added
        complete_BT1 = (past + groups.done_BT)[:, :, None]
        segment_BS, place_S = known.segment_BS[:, :S], torch.arange(S, device=x_BTD.device)
        seen_BTS = (segment_BS[:, None] == ctx.segment_BT[:, :, None]) & (place_S < complete_BT1)
        seen_BTS = F.pad(seen_BTS, (1, 0), value=True)
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, seen_BTS[:, None])
        return y_BNTH.transpose(1, 2).reshape(B, T, D)

    def _normed(self, x_BTD: Tensor, norm: nn.RMSNorm, dtype: torch.dtype) -> Tensor:
        """Heads [B, N, T, H], normed in the type of the residual stream."""
        x_BNTH: Tensor = norm(self._heads(x_BTD).to(dtype))
        # autocast leaves norms in fp32: queries and keys must agree with the values
        return x_BNTH.to(x_BTD.dtype)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, -1, self.head_dim).transpose(1, 2)

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """Readers' matrices and scores for every token, the rest for every chunk."""
        D = self.dim
        chunks = -(-context_len // self.chunk_len)
        rounds = [messages.cost(chunks, value_bytes) for messages in self.each]
        node = 4 * D**2
        # all nodes of a window are scored for every token, with the message of zeros
        scores = 4 * D * (chunks + 1)
        reader = 4 * D**2 + scores

        def share(of_chunks: int) -> int:
            return round(of_chunks * chunks / context_len)

        key_bytes = 2 * value_bytes * D + 2 * 8
        return Cost(
            flops_per_token=reader + share(node + sum(r.flops_per_token for r in rounds)),
            # a fused backward pass makes the scores again: five products instead of four
            training_flops=3 * reader
            + scores // 2
            + share(3 * node + sum(r.training_flops for r in rounds)),
            decode_flops=reader + (node + sum(r.decode_flops for r in rounds)) // self.chunk_len,
            state_bytes=key_bytes * chunks
            + sum(r.state_bytes for r in rounds)
            + max(value_bytes, 4) * D
            + 8,
        )
