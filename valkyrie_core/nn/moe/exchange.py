"""How the experts of one token tell each other something.

`attention` is ours: before they are summed, the outputs of a token's experts look at each other.
`chain` is published (Wang et al. 2025, Chain-of-Experts, arXiv 2506.18945): the layer routes
several times, each time to as many fewer experts; what came out is added to what goes in.

Shapes: R tokens, D model, K slots of a token, W width, M entries (a token at one of its experts).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Discriminator, Field
from torch import Tensor, nn

from valkyrie_core.config import Config
from valkyrie_core.nn.moe.dispatch import Entries
from valkyrie_core.nn.moe.gates import Choice


class AttendConfig(Config):
    """A token's experts attend to each other's outputs before these are summed."""

    type: Literal["attention"] = "attention"
    width: int = Field(default=32, ge=1)
    """Width of queries, keys and values."""


class ChainConfig(Config):
    """Routes again and again within the layer, at the same number of experts in all."""

    type: Literal["chain"] = "chain"
    rounds: int = Field(default=2, ge=2)
    """Times that a token is routed; must divide the gate's experts per token."""


ExchangeConfig = Annotated[AttendConfig | ChainConfig, Discriminator("type")]


class Exchange(nn.Module):
    """One head of attention among the experts of a token; begins by changing nothing."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, width, bias=False)
        self.key = nn.Linear(dim, width, bias=False)
        self.value = nn.Linear(dim, width, bias=False)
        self.output = nn.Linear(width, dim, bias=False)
        for layer in (self.query, self.key, self.value):
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.output.weight)

    def forward(self, y_MD: Tensor, choice: Choice, plan: Entries) -> Tensor:
        """[M, D]: every expert's output, and what it saw of the others'."""
        R, K = choice.experts_RK.shape
        place_M = plan.tokens_M * K + plan.slots_M
        y_RKD = y_MD.new_zeros(R * K, y_MD.shape[1]).index_copy(0, place_M, y_MD).view(R, K, -1)
        q_RKW, k_RKW, v_RKW = self.query(y_RKD), self.key(y_RKD), self.value(y_RKD)
        scores_RKK = q_RKW @ k_RKW.mT / math.sqrt(q_RKW.shape[-1])
        if choice.used_RK is not None:
            scores_RKK = scores_RKK.masked_fill(~choice.used_RK[:, None], -torch.inf)
        seen_RKD: Tensor = self.output(scores_RKK.softmax(-1).to(v_RKW.dtype) @ v_RKW)
        return y_MD + seen_RKD.flatten(0, 1).index_select(0, place_M).to(y_MD.dtype)

    def flops_per_token(self, slots: int) -> int:
        """Forward operations."""
        D, W = self.output.weight.shape
        return slots * (2 * 4 * D * W + 4 * slots * W)
