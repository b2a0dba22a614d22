"""What attention does beyond one causal rule for all: windows, sinks, ALiBi, sparse weights.

Scores exist for some queries at a time. Shapes are those of `attention.py`; R is G * T, the queries
that share a key head.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from valkyrie_core.nn.kv_cache import PADDING, KVState
from valkyrie_core.nn.sparsemax import sparsemax

Normalizer = Literal["softmax", "sparsemax"]

QUERIES_AT_ONCE = 128
"""Queries of a windowed or biased layer whose scores exist at one time."""


class Sight(NamedTuple):
    """What a query sees of its document, and how a key's distance counts."""

    window: int | None
    """Last tokens, the query's own included; None: all."""
    sinks: int
    """With a window: first tokens that stay in sight, as if just before it."""
    slopes: tuple[float, ...] | None
    """ALiBi's, one a head; None: no bias."""
    normalizer: Normalizer = "softmax"
    """What makes weights of scores."""

    @property
    def is_plain(self) -> bool:
        """Whether, inside the window, torch's own attention serves."""
        return self.slopes is None and self.normalizer == "softmax"

    def slides(self, num_tokens: int) -> bool:
        """Whether a context is longer than the window."""
        return self.window is not None and num_tokens > self.window

    def computed_pairs(self, num_tokens: int) -> int:
        """Pairs of query and key over a context, with those that a block computes and masks."""
        if self.is_plain and not self.slides(num_tokens):
            return num_tokens * (num_tokens + 1) // 2
        if self.window is None:
            blocks, rest = divmod(num_tokens, QUERIES_AT_ONCE)
            return QUERIES_AT_ONCE**2 * blocks * (blocks + 1) // 2 + rest * num_tokens
        pairs = 0
        for start in range(0, num_tokens, QUERIES_AT_ONCE):
            if start + 1 >= self.window + self.sinks:
                # all blocks from here on are alike, but for the last
                blocks, rest = divmod(num_tokens - start, QUERIES_AT_ONCE)
                before = self.window - 1 + self.sinks
                whole = blocks * QUERIES_AT_ONCE * (QUERIES_AT_ONCE + before)
                return pairs + whole + rest * (rest + before)
            stop = min(start + QUERIES_AT_ONCE, num_tokens)
            pairs += (stop - start) * stop
        return pairs


def sdpa(q_BNTH: Tensor, cache: KVState, stop: int, mask: Tensor | None) -> Tensor:
    """[B, N, T, H] by torch's own attention over the first `stop` keys of the cache."""
    k_BNSH, v_BNSH = (
        _for_heads(x_BKSH[:, :, :stop], q_BNTH) for x_BKSH in (cache.k_BKSH, cache.v_BKSH)
    )
    return F.scaled_dot_product_attention(
        q_BNTH,
        k_BNSH,
        v_BNSH,
        attn_mask=mask,
        is_causal=mask is None and q_BNTH.shape[2] > 1,
    )


def bidirectional(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, normalizer: Normalizer) -> Tensor:
    """[B, N, T, H]: every position sees all others, later ones too."""
    if normalizer == "sparsemax":
        return _weighted(sparsemax(_scores(q_BNTH, k_BKTH)), v_BKTH, q_BNTH.dtype)
    return F.scaled_dot_product_attention(
        q_BNTH, _for_heads(k_BKTH, q_BNTH), _for_heads(v_BKTH, q_BNTH)
    )


def _for_heads(x_BKSH: Tensor, q_BNTH: Tensor) -> Tensor:
    """Keys or values for every query head, in the queries' type."""
    if x_BKSH.shape[1] != q_BNTH.shape[1]:
        x_BKSH = x_BKSH.repeat_interleave(q_BNTH.shape[1] // x_BKSH.shape[1], dim=1)
    return x_BKSH.to(q_BNTH.dtype)


def attend(
    sight: Sight,
    q_BNTH: Tensor,
    sink_q_BNTH: Tensor | None,
    pos_BT: Tensor,
    segment_BT: Tensor,
    cache: KVState,
) -> Tensor:
    """[B, N, T, H] with a window or a bias, some queries at a time."""
    past = cache.length - q_BNTH.shape[2]
    # SDPA takes a bias in the type of the queries, and bf16 is too coarse for one of thousands
    wide = q_BNTH.dtype in (torch.float32, torch.float64)
    slides = sight.window is not None and not torch.compiler.is_compiling()
    if slides:
        # without padding no key is further away in the cache than in its document; how many
        # sinks there are is a value, of which a compiled graph knows nothing
        slides = bool((cache.segment_BS[:, : cache.length] != PADDING).all())
    pieces = []
    for start in range(0, q_BNTH.shape[2], QUERIES_AT_ONCE):
        piece = slice(start, start + QUERIES_AT_ONCE)
        stop = min(past + piece.stop, cache.length)
        biased = sight.slopes is not None and sight.normalizer == "softmax"
        if sight.window is None and biased and wide:
            assert sight.slopes is not None
            pos_BS, segment_BS = cache.pos_BS[:, :stop], cache.segment_BS[:, :stop]
            seen_BTS = seen(segment_BT[:, piece], segment_BS, past + start)
            mask = _biased(sight.slopes, seen_BTS, pos_BT[:, start], pos_BS, q_BNTH.dtype)
            pieces.append(sdpa(q_BNTH[:, :, piece], cache, stop, mask))
            continue
        keys_S = torch.arange(stop, device=q_BNTH.device)
        if slides:
            assert sight.window is not None
            near = max(0, past + start - sight.window + 1)
            # before the window nothing is seen but sinks, of whichever row
            sinks_S = (cache.pos_BS[:, :near] < sight.sinks).any(dim=0).nonzero()[:, 0]
            keys_S = torch.cat([sinks_S, keys_S[near:]])
        pos_BS, segment_BS = cache.pos_BS[:, keys_S], cache.segment_BS[:, keys_S]
        k_BKSH, v_BKSH = cache.k_BKSH[:, :, keys_S], cache.v_BKSH[:, :, keys_S]
        scores_BNTS = _scores(q_BNTH[:, :, piece], k_BKSH)
        if sink_q_BNTH is not None:
            sink_BS = (pos_BS < sight.sinks)[:, None, None]
            sink_scores_BNTS = _scores(sink_q_BNTH[:, :, piece], k_BKSH)
            scores_BNTS = torch.where(sink_BS, sink_scores_BNTS, scores_BNTS)
        seen_BTS = seen(segment_BT[:, piece], segment_BS, past + start, keys_S)
        distance_BTS = pos_BT[:, piece, None] - pos_BS[:, None, :]
        if sight.window is not None:
            sink_B1S = (pos_BS < sight.sinks)[:, None]
            seen_BTS = seen_BTS & ((distance_BTS < sight.window) | sink_B1S)
            nearest_BTS = (sight.window + sight.sinks - 1) - pos_BS[:, None, :]
            distance_BTS = torch.where(
                sink_B1S, torch.minimum(distance_BTS, nearest_BTS), distance_BTS
            )
        if sight.slopes is not None:
            slopes_N11 = scores_BNTS.new_tensor(sight.slopes)[:, None, None]
            scores_BNTS = scores_BNTS - slopes_N11 * distance_BTS[:, None]
        scores_BNTS = scores_BNTS.masked_fill(~seen_BTS[:, None], -torch.inf)
        normalize = sparsemax if sight.normalizer == "sparsemax" else _softmax
        pieces.append(_weighted(normalize(scores_BNTS), v_BKSH, q_BNTH.dtype))
    return torch.cat(pieces, dim=2)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _biased(
    slopes: tuple[float, ...],
    seen_BTS: Tensor,
    pos_B: Tensor,
    pos_BS: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[B, N, T, S]: ALiBi's bias where a key is seen, else -inf.

    What is the same for all keys of a query changes nothing: distances are counted from the
    position `pos_B` of the first query, so that one row serves them all.
    """
    slopes_N11 = torch.tensor(slopes, dtype=dtype, device=pos_BS.device)[:, None, None]
    bias_BN1S = slopes_N11 * (pos_BS - pos_B[:, None])[:, None, None, :]
    return torch.where(seen_BTS[:, None], bias_BN1S, -torch.inf)


def _scores(q_BNTH: Tensor, k_BKSH: Tensor) -> Tensor:
    """[B, N, T, S] in fp32 or better: a bias of thousands leaves no room for scores in bf16."""
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKRH = q_BNTH.reshape(B, K, N // K * T, H) / math.sqrt(H)
    scores_BKRS = q_BKRH @ k_BKSH.to(q_BNTH.dtype).transpose(2, 3)
    wide = torch.promote_types(scores_BKRS.dtype, torch.float32)
    return scores_BKRS.view(B, N, T, S).to(wide)


def _weighted(weights_BNTS: Tensor, v_BKSH: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [B, N, T, H], weighted per query, in the type of the queries."""
    B, N, T, S = weights_BNTS.shape
    K, H = v_BKSH.shape[1], v_BKSH.shape[3]
    weights_BKRS = weights_BNTS.to(dtype).view(B, K, N // K * T, S)
    return (weights_BKRS @ v_BKSH.to(dtype)).view(B, N, T, H)


def seen(segment_BT: Tensor, segment_BS: Tensor, past: int, keys_S: Tensor | None = None) -> Tensor:
    """[B, T, S]: the same document, not later; padding sees itself, so that no row is empty.

    Args:
        past: the place in the cache of the first query's key.
        keys_S: the keys' places in the cache; None: from its beginning.
    """
    T, S = segment_BT.shape[1], segment_BS.shape[1]
    t_T1 = torch.arange(T, device=segment_BT.device)[:, None] + past
    s_S = torch.arange(S, device=segment_BT.device) if keys_S is None else keys_S
    same_BTS = segment_BT[:, :, None] == segment_BS[:, None, :]
    real_BT1 = (segment_BT != PADDING)[:, :, None]
    return (same_BTS & real_BT1 & (s_S <= t_T1)) | (s_S == t_T1)
