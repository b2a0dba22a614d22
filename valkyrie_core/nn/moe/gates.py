"""Gates: from a router's logits to the experts of every token and their weights.

A gate turns logits into affinities; what it ranks experts by is handed to it, so that a bias or a
limit to some groups changes which experts are chosen and never how much they weigh.

Shapes: R tokens, E experts, K slots of a token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.config import Config
from valkyrie_core.nn.layers import Role

Rank = Callable[[Tensor], Tensor]
"""From affinities [R, E] to what experts are chosen by; -inf: not at all."""


class Choice(NamedTuple):
    """The experts of every token."""

    experts_RK: Tensor
    """Ids, the best one first."""
    weights_RK: Tensor
    """What an expert's output is multiplied by; 0 in a slot that is not used."""
    used_RK: Tensor | None
    """Which slots are used; None: all."""
    probs_RE: Tensor
    """Affinities that sum to 1 over the experts."""


class SoftmaxTopKConfig(Config):
    """The k most probable experts, their probabilities scaled to sum to 1."""

    type: Literal["softmax_topk"] = "softmax_topk"
    top_k: int = Field(default=2, ge=1)
    """Experts per token."""

    @property
    def slots(self) -> int:
        """The most experts that a token meets."""
        return self.top_k

    def divided(self, rounds: int) -> SoftmaxTopKConfig:
        """The gate of one of several rounds."""
        return self.model_copy(update={"top_k": self.top_k // rounds})

    def build(self, dim: int, num_experts: int) -> SoftmaxTopK:
        """The module this section describes."""
        return SoftmaxTopK(self.top_k)


class SigmoidTopKConfig(Config):
    """Experts that don't compete: the k largest sigmoids, scaled to sum to 1.

    DeepSeek-AI 2024 (arXiv 2412.19437).
    """

    type: Literal["sigmoid_topk"] = "sigmoid_topk"
    top_k: int = Field(default=2, ge=1)
    """Experts per token."""
    scale: float = Field(default=1.0, gt=0)
    """The weights sum to this."""

    @property
    def slots(self) -> int:
        """The most experts that a token meets."""
        return self.top_k

    def divided(self, rounds: int) -> SigmoidTopKConfig:
        """The gate of one of several rounds."""
        return self.model_copy(update={"top_k": self.top_k // rounds})

    def build(self, dim: int, num_experts: int) -> SigmoidTopK:
        """The module this section describes."""
        return SigmoidTopK(self.top_k, self.scale)


class NoisyTopKConfig(Config):
    """Top-k of logits with noise, as much for each expert as a second matrix says.

    Shazeer et al. 2017 (arXiv 1701.06538). There is no noise outside of training.
    """

    type: Literal["noisy_topk"] = "noisy_topk"
    top_k: int = Field(default=2, ge=1)
    """Experts per token."""

    @property
    def slots(self) -> int:
        """The most experts that a token meets."""
        return self.top_k

    def divided(self, rounds: int) -> NoisyTopKConfig:
        """The gate of one of several rounds."""
        return self.model_copy(update={"top_k": self.top_k // rounds})

    def build(self, dim: int, num_experts: int) -> NoisyTopK:
        """The module this section describes."""
        return NoisyTopK(dim, num_experts, self.top_k)


class SwitchConfig(Config):
    """One expert per token, weighted by its probability (Fedus et al. 2021, arXiv 2101.03961)."""

    type: Literal["switch"] = "switch"
    jitter: float = Field(default=0.01, ge=0, lt=1)
    """In training logits are multiplied by a number between 1 - jitter and 1 + jitter."""

    @property
    def slots(self) -> int:
        """The most experts that a token meets."""
        return 1

    def divided(self, rounds: int) -> SwitchConfig:
        """The gate of one of several rounds: there is only one."""
        return self

    def build(self, dim: int, num_experts: int) -> Switch:
        """The module this section describes."""
        return Switch(self.jitter)


class TopPConfig(Config):
    """As many experts as it takes: an unsure router takes more (Huang et al. 2024, 2403.07652)."""

    type: Literal["top_p"] = "top_p"
    mass: float = Field(default=0.5, gt=0, le=1)
    """Experts are taken, the most probable first, until their probabilities sum to this."""
    max_experts: int = Field(default=4, ge=1)
    """And no more than so many."""

    @property
    def slots(self) -> int:
        """The most experts that a token meets."""
        return self.max_experts

    def divided(self, rounds: int) -> TopPConfig:
        """The gate of one of several rounds."""
        return self.model_copy(update={"max_experts": self.max_experts // rounds})

    def build(self, dim: int, num_experts: int) -> TopP:
        """The module this section describes."""
        return TopP(self.mass, self.max_experts)


GateConfig = Annotated[
    SoftmaxTopKConfig | SigmoidTopKConfig | NoisyTopKConfig | SwitchConfig | TopPConfig,
    Discriminator("type"),
]


class SoftmaxTopK(nn.Module):
    """See `SoftmaxTopKConfig`."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, x_RD: Tensor, logits_RE: Tensor, rank: Rank) -> Choice:
        """Chooses; one expert keeps its probability, or its router would learn nothing."""
        probs_RE = logits_RE.softmax(-1)
        experts_RK = _best(rank(probs_RE), self.top_k)
        weights_RK = probs_RE.gather(1, experts_RK)
        if self.top_k > 1:
            weights_RK = _scaled(weights_RK)
        return Choice(experts_RK, weights_RK, None, probs_RE)


class SigmoidTopK(nn.Module):
    """See `SigmoidTopKConfig`."""

    def __init__(self, top_k: int, scale: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.scale = scale

    def forward(self, x_RD: Tensor, logits_RE: Tensor, rank: Rank) -> Choice:
        """Chooses; one expert keeps its affinity, or its router would learn nothing."""
        affinity_RE = logits_RE.sigmoid()
        experts_RK = _best(rank(affinity_RE), self.top_k)
        weights_RK = affinity_RE.gather(1, experts_RK)
        if self.top_k > 1:
            weights_RK = _scaled(weights_RK)
        probs_RE = affinity_RE / affinity_RE.sum(-1, keepdim=True)
        return Choice(experts_RK, self.scale * weights_RK, None, probs_RE)


class NoisyTopK(SoftmaxTopK):
    """See `NoisyTopKConfig`."""

    roles: ClassVar[dict[str, Role]] = {"noise_ED": "router"}

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(top_k)
        self.noise_ED = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x_RD: Tensor, logits_RE: Tensor, rank: Rank) -> Choice:
        """Chooses by logits with noise, in training."""
        if self.training:
            scale_RE = F.softplus(F.linear(x_RD, self.noise_ED.to(x_RD.dtype)))
            logits_RE = logits_RE + scale_RE * torch.randn_like(logits_RE)
        return super().forward(x_RD, logits_RE, rank)


class Switch(nn.Module):
    """See `SwitchConfig`."""

    def __init__(self, jitter: float) -> None:
        super().__init__()
        self.jitter = jitter

    def forward(self, x_RD: Tensor, logits_RE: Tensor, rank: Rank) -> Choice:
        """Chooses one expert."""
        if self.training and self.jitter:
            logits_RE = logits_RE * (1 + self.jitter * (2 * torch.rand_like(logits_RE) - 1))
        probs_RE = logits_RE.softmax(-1)
        experts_RK = _best(rank(probs_RE), 1)
        return Choice(experts_RK, probs_RE.gather(1, experts_RK), None, probs_RE)


class TopP(nn.Module):
    """See `TopPConfig`."""

    def __init__(self, mass: float, max_experts: int) -> None:
        super().__init__()
        self.mass = mass
        self.max_experts = max_experts

    def forward(self, x_RD: Tensor, logits_RE: Tensor, rank: Rank) -> Choice:
        """Chooses until the mass is reached."""
        probs_RE = logits_RE.softmax(-1)
        ranked_RE = rank(probs_RE)
        experts_RK = _best(ranked_RE, self.max_experts)
        own_RK = probs_RE.gather(1, experts_RK)
        before_RK = own_RK.cumsum(-1) - own_RK
        used_RK = (before_RK < self.mass) & (ranked_RE.gather(1, experts_RK) > -torch.inf)
        used_RK[:, 0] = True
        weights_RK = own_RK * used_RK
        weights_RK = _scaled(weights_RK)
        return Choice(experts_RK, weights_RK, used_RK, probs_RE)


def _best(ranked_RE: Tensor, count: int) -> Tensor:
    """The ids [R, K] of the best ones; of equal ones the first, whatever else is in the batch."""
    order_RE = ranked_RE.detach().sort(dim=-1, descending=True, stable=True).indices
    return order_RE[:, :count]


def _scaled(weights_RK: Tensor) -> Tensor:
    """Weights that sum to 1; 0 where all of them underflowed."""
    total_R1 = weights_RK.sum(-1, keepdim=True)
    return weights_RK / total_R1.clamp(min=torch.finfo(weights_RK.dtype).tiny)
