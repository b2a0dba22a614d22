"""What keeps experts in use: losses on the routing, each a small class of its own.

Every loss is 0 or at its least where all experts are used alike, and counts real tokens alone.
Moving a bias instead is in `router.py`: it adds no loss.

Shapes: R tokens, E experts, K slots of a token.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field
from torch import Tensor

from valkyrie_core.config import Config


class Traffic(NamedTuple):
    """What a router did with the real tokens of one window."""

    logits_RE: Tensor
    probs_RE: Tensor
    weights_RE: Tensor
    """What each expert's output is multiplied by; 0 where it is not chosen."""
    load_E: Tensor
    """Tokens by expert; no gradient."""


class AuxConfig(Config):
    """Experts x sum over them of (share of the load x mean probability): 1 where all are alike.

    Fedus et al. 2021 (arXiv 2101.03961). The gradient goes through the probabilities.
    """

    type: Literal["aux"] = "aux"
    coefficient: float = Field(default=0.01, gt=0)
    """What it is multiplied by."""

    def loss(self, traffic: Traffic) -> Tensor:
        """Weighted."""
        share_E = traffic.load_E / traffic.load_E.sum().clamp(min=1)
        num_experts = len(share_E)
        mean_E = traffic.probs_RE.sum(0) / max(1, len(traffic.probs_RE))
        return self.coefficient * num_experts * (share_E * mean_E).sum()


class ZLossConfig(Config):
    """Mean squared logsumexp of the logits: keeps them small (Zoph et al. 2022, 2202.08906)."""

    type: Literal["z_loss"] = "z_loss"
    coefficient: float = Field(default=0.001, gt=0)
    """What it is multiplied by."""

    def loss(self, traffic: Traffic) -> Tensor:
        """Weighted."""
        size_R = traffic.logits_RE.logsumexp(-1).square()
        return self.coefficient * size_R.sum() / max(1, len(size_R))


class ImportanceConfig(Config):
    """Squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017)."""

    type: Literal["importance"] = "importance"
    coefficient: float = Field(default=0.01, gt=0)
    """What it is multiplied by."""

    def loss(self, traffic: Traffic) -> Tensor:
        """Weighted."""
        importance_E = traffic.weights_RE.sum(0)
        variance = importance_E.var(correction=0)
        tiny = torch.finfo(importance_E.dtype).tiny
        return self.coefficient * variance / importance_E.mean().square().clamp(min=tiny)


class BiasConfig(Config):
    """A bias on what experts are chosen by, moved after every step against its load error.

    Wang et al. 2024 (arXiv 2408.15664). The load is that of the whole batch of the step before:
    that of the present one would tell a token about later ones. Adds nothing to the loss. The rate
    is scaled as the learning rates are, so that biases settle with the weights.
    """

    type: Literal["bias"] = "bias"
    rate: float = Field(default=1e-3, gt=0)
    """How far the bias moves at a step, up for too little load and down for too much."""


Balance = Annotated[AuxConfig | ZLossConfig | ImportanceConfig | BiasConfig, Discriminator("type")]
