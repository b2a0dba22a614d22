"""From logits to a token: temperature, top-k, top-p, repetition penalty.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from valkyrie_core.config import Config
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import DivergedError


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
    logits_BV = logits_BV.detach().cpu().double()
    if allowed_V is None:
        allowed_V = torch.ones(logits_BV.shape[1], dtype=torch.bool)
    if not torch.isfinite(logits_BV[:, allowed_V]).all():
        raise DivergedError(
            "the model's logits are not finite",
            hint="its weights are damaged or its training diverged: take an earlier checkpoint",
        )
    logits_BV = logits_BV.masked_fill(~allowed_V, -torch.inf)
    if histories and sampling.repetition_penalty != 1.0:
        rows = [
            penalize(row_V, history[-sampling.repetition_window :], sampling.repetition_penalty)
            for row_V, history in zip(logits_BV, histories, strict=True)
        ]
        logits_BV = torch.stack(rows)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    values_BK, tokens_BK = _likeliest(logits_BV, sampling)
    return _draw(values_BK, tokens_BK, sampling.temperature, sampling.top_p, generators)


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


def _draw(
    values_BK: Tensor,
    tokens_BK: Tensor,
    temperature: float,
    top_p: float,
    generators: Sequence[torch.Generator],
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
    uniform_B1 = torch.stack(
        [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    )
    target_B1 = uniform_B1 * cumulative_BK[:, -1:]
    index_B1 = (cumulative_BK <= target_B1).sum(dim=-1, keepdim=True)
    # rounding may put the target on the total: then the last candidate with any probability
    last_B1 = (probs_BK > 0).sum(dim=-1, keepdim=True) - 1
    return tokens_BK.gather(-1, torch.minimum(index_B1, last_B1)).squeeze(-1)
