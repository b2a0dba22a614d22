"""From logits to a token: temperature, top-k, top-p, repetition penalty.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch
from pydantic import Field
from torch import Tensor

from valkyrie_core.config import Config
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import DivergedError

PREFIXES = (64, 1024)
"""So many of the likeliest tokens settle most draws."""
MARGIN = 1e-9
"""Far above what fp64 sums of a vocabulary differ by in another order."""


class SamplingConfig(Config):
    """How the next token is drawn."""

    temperature: float = Field(default=0.8, ge=0, le=10)
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draws from the smallest set of likeliest tokens that holds this much probability."""
    top_k: int | None = Field(default=None, ge=1)
    """Draws from this many likeliest tokens; from all if left out."""
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=10)
    """Above 1 makes tokens that were just used less likely (CTRL, arXiv 1909.05858)."""
    repetition_window: int = Field(default=64, ge=1, le=65_536)
    """How many of the last tokens count as just used."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Fixes the draws; the same seed and prompt give the same answer."""


def allowed_tokens(vocab_size: int, stop_ids: Iterable[int]) -> Tensor:
    """A bool mask [V]: every text token and the given stop tokens; no other reserved id.

    Raises:
        ValueError: a stop id outside the vocabulary.
    """
    allowed_V = torch.ones(vocab_size, dtype=torch.bool)
    allowed_V[:NUM_RESERVED] = False
    for token in stop_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop id {token} is outside the vocabulary of {vocab_size}")
        allowed_V[token] = True
    return allowed_V


def make_generator(seed: int, *stream: int) -> torch.Generator:
    """A generator of its own for each (seed, stream...): streams are unrelated to one another."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *stream)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample(
    logits_BV: Tensor,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
    *,
    allowed_V: Tensor | None = None,
    histories: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Draws one token per row: a pure function of its arguments and the generators' states.

    A row's draw depends on its own logits, history and generator only, not on its batch mates.
    Greedy draws use no randomness. The work is done on the CPU, in fp64, so that a seed means
    the same on every device.

    Args:
        logits_BV: any float type, any device.
        generators: one CPU generator per row; advanced by one number unless greedy.
        allowed_V: tokens that may be drawn; all if left out.
        histories: per row, the tokens so far, oldest first; reserved ids are never penalised.

    Returns:
        int64 token ids [B], on the CPU.

    Raises:
        DivergedError: a logit of an allowed token is NaN, or infinite.
        ValueError: the number of generators or histories is not the number of rows.
    """
    num_rows = logits_BV.shape[0]
    if len(generators) != num_rows or (histories and len(histories) != num_rows):
        raise ValueError(f"{num_rows} rows need as many generators and histories")
    # fp32 numbers order and compare as their fp64 values do: they are widened where they are added
    logits_BV = logits_BV.detach().cpu()
    if logits_BV.dtype != torch.float32:
        logits_BV = logits_BV.double()
    logits_BV = _only_allowed(logits_BV, allowed_V)
    if histories and sampling.repetition_penalty != 1.0:
        rows = [
            penalize(
                row_V.double(), history[-sampling.repetition_window :], sampling.repetition_penalty
            )
            for row_V, history in zip(logits_BV, histories, strict=True)
        ]
        logits_BV = torch.stack(rows)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    uniform_B1 = torch.stack(
        [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    )
    drawn = [
        _draw_quickly(row_V, sampling, float(uniform_1))
        for row_V, uniform_1 in zip(logits_BV, uniform_B1, strict=True)
    ]
    if None in drawn:
        values_BK, tokens_BK = _likeliest(logits_BV.double(), sampling)
        all_B = _draw(values_BK, tokens_BK, sampling.temperature, sampling.top_p, uniform_B1)
        drawn = [
            one if one is not None else int(other) for one, other in zip(drawn, all_B, strict=True)
        ]
    return torch.tensor(drawn)


def _only_allowed(logits_BV: Tensor, allowed_V: Tensor | None) -> Tensor:
    """Minus infinity wherever no token may be drawn; raises as `sample` says."""
    allowed = logits_BV if allowed_V is None else logits_BV.masked_fill(~allowed_V, 0.0)
    # a sum is quicker than looking at each; only huge numbers overflow it, and are looked at
    if not math.isfinite(float(allowed.sum())) and not bool(torch.isfinite(allowed).all()):
        raise DivergedError(
            "the model's logits are not finite",
            hint="its weights are damaged or its training diverged: take an earlier checkpoint",
        )
    return logits_BV if allowed_V is None else logits_BV.masked_fill(~allowed_V, -torch.inf)


def penalize(logits_V: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Positive logits of the given tokens are divided by the penalty, negative ones multiplied.

    Reserved ids are left alone: an end marker that was written often is no repetition.
    """
    used = sorted({token for token in tokens if token >= NUM_RESERVED})
    if not used:
        return logits_V
    logits_V = logits_V.clone()
    chosen = logits_V[used]
    logits_V[used] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits_V


def _likeliest(logits_BV: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Logits and ids of the candidates, best first; equal logits in the order of their ids."""
    values_BK, tokens_BK = logits_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        values_BK, tokens_BK = values_BK[:, : sampling.top_k], tokens_BK[:, : sampling.top_k]
    return values_BK, tokens_BK


def _draw_quickly(logits_V: Tensor, sampling: SamplingConfig, uniform: float) -> int | None:
    for size in PREFIXES:
        # a small vocabulary is sorted as fast
        if logits_V.shape[0] > 4 * size:
            drawn = draw_from_prefix(logits_V, sampling, uniform, size)
            if drawn is not None:
                return drawn
    return None


def draw_from_prefix(
    logits_V: Tensor, sampling: SamplingConfig, uniform: float, size: int
) -> int | None:
    """What `_draw` gives, from the `size` likeliest tokens: sorting them all takes milliseconds.

    None where they do not settle it: too little of the probability, or a decision so close that
    the order of additions could turn it.
    """
    likeliest = logits_V.topk(size)
    values_K, tokens_K = likeliest.values.double().numpy(), likeliest.indices.numpy()
    # of tokens that equal the last one, others may have been left out
    sure = values_K > values_K[-1]
    values_K, tokens_K = values_K[sure], tokens_K[sure]
    if len(values_K) < (sampling.top_k or 1):
        return None
    order_K = numpy.lexsort((tokens_K, -values_K))[: sampling.top_k]
    best = values_K[order_K[0]]
    with numpy.errstate(over="ignore"):
        weights_K = numpy.exp((values_K[order_K] - best) / sampling.temperature)
    total = weights_K.sum()
    if sampling.top_k is None:
        total = float(((logits_V.double() - float(best)) / sampling.temperature).exp_().sum())
    cumulative_K = numpy.cumsum(weights_K / total)
    held = 1.0
    if sampling.top_p < 1:
        # the nucleus ends with the token that reaches top_p
        end = int(numpy.searchsorted(cumulative_K, sampling.top_p))
        if end < len(cumulative_K):
            held = cumulative_K[end]
        elif sampling.top_k is None:
            return None
        if _is_close(cumulative_K, end, sampling.top_p):
            return None
    index = int(numpy.searchsorted(cumulative_K, uniform * held, side="right"))
    if index == len(cumulative_K) or _is_close(cumulative_K, index, uniform * held):
        return None
    return int(tokens_K[order_K[index]])


def _is_close(cumulative_K: numpy.ndarray[Any, Any], index: int, value: float) -> bool:
    """Whether a sum beside the place where `value` belongs is as good as equal to it."""
    return bool((abs(cumulative_K[max(0, index - 1) : index + 1] - value) < MARGIN).any())


def _draw(
    values_BK: Tensor,
    tokens_BK: Tensor,
    temperature: float,
    top_p: float,
    uniform_B1: Tensor,
) -> Tensor:
    """Inverts the cumulative distribution of the nucleus at one uniform number per row."""
    # the best logit is subtracted before dividing: a tiny temperature must not overflow
    scaled_BK = (values_BK - values_BK[:, :1]) / temperature
    probs_BK = torch.softmax(scaled_BK, dim=-1)
    if top_p < 1:
        before_BK = probs_BK.cumsum(dim=-1) - probs_BK
        # the best candidate has nothing before it, so the nucleus is never empty
        probs_BK = probs_BK.masked_fill(before_BK >= top_p, 0.0)
    cumulative_BK = probs_BK.cumsum(dim=-1)
    target_B1 = uniform_B1 * cumulative_BK[:, -1:]
    index_B1 = (cumulative_BK <= target_B1).sum(dim=-1, keepdim=True)
    # rounding may put the target on the total: then the last candidate with any probability
    last_B1 = (probs_BK > 0).sum(dim=-1, keepdim=True) - 1
    return tokens_BK.gather(-1, torch.minimum(index_B1, last_B1)).squeeze(-1)
