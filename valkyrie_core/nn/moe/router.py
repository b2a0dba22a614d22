"""A router: logits in fp32, groups, the bias that balances, and what it did with its tokens.

Shapes: R tokens, D model, E experts, K slots of a token, G groups, J experts of a group.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.config import Config
from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.moe.balance import Traffic
from valkyrie_core.nn.moe.gates import Choice, GateConfig


class GroupsConfig(Config):
    """Two levels: the best groups of experts first, then experts within them.

    A group is worth the sum of its two best experts (DeepSeek-AI 2024, arXiv 2412.19437).
    """

    num_groups: int = Field(ge=2)
    """Groups of equally many experts; must divide num_experts."""
    top_groups: int = Field(default=1, ge=1)
    """Groups that a token may use."""

    def limit(self, ranked_RE: Tensor) -> Tensor:
        """What experts are ranked by, -inf outside of the best groups."""
        ranked_RGJ = ranked_RE.view(len(ranked_RE), self.num_groups, -1)
        best_two = min(2, ranked_RGJ.shape[2])
        worth_RG = ranked_RGJ.topk(best_two, dim=2).values.sum(2)
        order_RG = worth_RG.sort(dim=1, descending=True, stable=True).indices
        open_RG = torch.zeros_like(worth_RG, dtype=torch.bool)
        open_RG = open_RG.scatter(1, order_RG[:, : self.top_groups], True)
        return ranked_RGJ.masked_fill(~open_RG[:, :, None], -torch.inf).view_as(ranked_RE)


class ConfidenceConfig(Config):
    """A learned confidence between 0 and 1 per token; logits are scaled by twice of it.

    It begins at one half, which changes nothing. Where it is low the weights are more alike, and
    `top_p` takes more experts.
    """


class Router(nn.Module):
    """Chooses experts for tokens."""

    roles: ClassVar[dict[str, Role]] = {"weight_ED": "router", "confidence_1D": "router"}

    def __init__(
        self,
        dim: int,
        num_experts: int,
        gate: GateConfig,
        groups: GroupsConfig | None,
        *,
        confident: bool,
    ) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        self.gate = gate.build(dim, num_experts)
        self.groups = groups
        self.confidence_1D = nn.Parameter(torch.zeros(1, dim)) if confident else None
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.bias_E: Tensor
        nn.init.normal_(self.weight_ED, std=1 / math.sqrt(dim))

    def forward(self, x_RD: Tensor) -> tuple[Tensor, Choice]:
        """The logits [R, E] and the choice, in fp32 or better."""
        precise = torch.promote_types(x_RD.dtype, torch.float32)
        with torch.autocast(x_RD.device.type, enabled=False):
            x_RD = x_RD.to(precise)
            logits_RE = F.linear(x_RD, self.weight_ED.to(precise))
            if self.confidence_1D is not None:
                sure_R1 = F.linear(x_RD, self.confidence_1D.to(precise)).sigmoid()
                logits_RE = 2 * sure_R1 * logits_RE
            choice: Choice = self.gate(x_RD, logits_RE, self._rank)
        return logits_RE, choice

    def flops_per_token(self) -> int:
        """Forward operations."""
        sure = 0 if self.confidence_1D is None else self.confidence_1D.numel()
        return 2 * (self.weight_ED.numel() + sure)

    def flops_of_noise(self) -> int:
        """Forward operations that are done in training alone."""
        return 2 * sum(parameter.numel() for parameter in self.gate.parameters())

    def confidence(self, x_RD: Tensor) -> Tensor | None:
        """[R] how sure the router is; None where it has not learned to say."""
        if self.confidence_1D is None:
            return None
        return F.linear(x_RD, self.confidence_1D.to(x_RD.dtype))[:, 0].sigmoid()

    def _rank(self, affinity_RE: Tensor) -> Tensor:
        ranked_RE = affinity_RE.detach() + self.bias_E.to(affinity_RE.dtype)
        return ranked_RE if self.groups is None else self.groups.limit(ranked_RE)


def traffic(logits_RE: Tensor, choice: Choice, real_R: Tensor | None) -> Traffic:
    """What a router did with the real tokens.

    Args:
        real_R: which tokens are no padding; None: all.
    """
    used_RK = torch.ones_like(choice.experts_RK, dtype=torch.bool)
    if choice.used_RK is not None:
        used_RK = choice.used_RK
    weights_RE = torch.zeros_like(choice.probs_RE).scatter(
        1, choice.experts_RK, choice.weights_RK * used_RK
    )
    chosen_RE = torch.zeros_like(choice.probs_RE).scatter(
        1, choice.experts_RK, used_RK.to(choice.probs_RE.dtype)
    )
    probs_RE = choice.probs_RE
    if real_R is not None:
        # what stands at padding is nobody's traffic
        logits_RE, probs_RE, weights_RE, chosen_RE = (
            part[real_R] for part in (logits_RE, probs_RE, weights_RE, chosen_RE)
        )
    return Traffic(logits_RE, probs_RE, weights_RE, chosen_RE.sum(0).detach())
