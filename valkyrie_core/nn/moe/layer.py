"""A mixture of experts in the place of a feed-forward layer: dropless, as many tokens as come.

Shazeer et al. 2017 (arXiv 1701.06538). A token's output depends on itself alone, whoever else is in
the batch.

Shapes: B batch, T time, D model, R = B * T tokens, E experts, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, model_validator
from torch import Tensor, nn

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.kernels import rows
from valkyrie_core.nn.ffn import SwiGLU
from valkyrie_core.nn.moe.balance import Balance, BiasConfig
from valkyrie_core.nn.moe.dispatch import entries
from valkyrie_core.nn.moe.exchange import AttendConfig, ChainConfig, Exchange, ExchangeConfig
from valkyrie_core.nn.moe.experts import MlpConfig
from valkyrie_core.nn.moe.gates import GateConfig, SoftmaxTopKConfig
from valkyrie_core.nn.moe.router import ConfidenceConfig, GroupsConfig, Router, traffic
from valkyrie_core.nn.moe.transformer import TransformerConfig
from valkyrie_core.nn.state import Cost, Ctx, Routed

ExpertConfig = Annotated[MlpConfig | TransformerConfig, Discriminator("type")]


class ReviveConfig(Config):
    """An expert that stays without work becomes a noisy copy of the busiest one.

    With its row of the router and its bias; the optimizer forgets what it knew of the old one.
    Duplicating an expert is published (2604.19835); doing so to those that died is ours.
    """

    window: int = Field(default=50, ge=1)
    """Steps that its load has to stay below `share`, one after the other."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Of a fair load."""
    noise: float = Field(default=0.1, gt=0)
    """Standard deviation of what is added, as a share of the copied weights' own."""
    cooldown: int = Field(default=100, ge=0)
    """Steps in which a new copy is left alone."""


class MoEConfig(Config):
    """A router and experts, of which every token meets a few."""

    type: Literal["moe"] = "moe"
    num_experts: int = Field(default=8, ge=2)
    """Experts that a router chooses among."""
    gate: GateConfig = SoftmaxTopKConfig()
    """How many experts a token meets, and how they are weighted."""
    balance: tuple[Balance, ...] = (BiasConfig(),)
    """What keeps all experts in use; empty: nothing."""
    groups: GroupsConfig | None = None
    """Chooses groups of experts first; left out, all are one group."""
    confidence: ConfidenceConfig | None = None
    """How sure the router is scales its logits; left out, it does not say."""
    expert: ExpertConfig = MlpConfig()
    """What an expert is."""
    exchange: ExchangeConfig | None = None
    """How a token's experts tell each other something; left out, they don't."""
    revive: ReviveConfig | None = None
    """Replaces experts that stay without work; left out, they stay as they are."""
    shared_experts: int = Field(default=0, ge=0)
    """Experts that every token meets besides, as one SwiGLU that is so many times as wide."""
    dense_layers: int = Field(default=0, ge=0)
    """So many first layers of the model are a SwiGLU as wide as what a token meets in others."""

    @model_validator(mode="after")
    def _numbers_agree(self) -> MoEConfig:
        limit, of = self.num_experts, "num_experts"
        if self.groups is not None:
            count = self.groups.num_groups
            if self.num_experts % count:
                raise MisfitError(
                    f"num_groups ({count}) must divide num_experts ({self.num_experts})",
                    ("groups", "num_groups"),
                )
            if self.groups.top_groups > count:
                raise MisfitError(
                    f"top_groups ({self.groups.top_groups}) is more than the {count} groups",
                    ("groups", "top_groups"),
                )
            limit = self.num_experts // count * self.groups.top_groups
            of = "the experts of top_groups groups"
        if self.gate.slots % self.rounds:
            raise MisfitError(
                f"rounds ({self.rounds}) must divide the {self.gate.slots} experts of a token",
                ("exchange", "rounds"),
            )
        if self.gate.slots // self.rounds > limit:
            raise MisfitError(
                f"a token can't meet {self.gate.slots} experts: {of} are {limit}", ("gate",)
            )
        kinds = [one.type for one in self.balance]
        for index, kind in enumerate(kinds):
            if kind in kinds[:index]:
                raise MisfitError(f"{kind!r} is there twice", ("balance", index))
        return self

    @property
    def rounds(self) -> int:
        """How often a token is routed."""
        return self.exchange.rounds if isinstance(self.exchange, ChainConfig) else 1

    @property
    def hidden_dim(self) -> int | None:
        """Width of an expert's hidden layer, where it is said."""
        return self.expert.hidden_dim

    def resized(self, hidden_dim: int) -> MoEConfig:
        """The same, with experts of another hidden width."""
        expert = self.expert.model_copy(update={"hidden_dim": hidden_dim})
        return self.model_copy(update={"expert": expert})

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> MoE | SwiGLU:
        """The module this section describes, or a dense one in the first layers."""
        if layer_idx < self.dense_layers:
            slots = self.gate.slots
            return SwiGLU(dim, (slots + self.shared_experts) * self.expert.width(dim, slots))
        return MoE(dim, self)


class MoE(nn.Module):
    """y = the weighted sum of what a token's experts make of it, and of the shared one."""

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        gate = config.gate.divided(config.rounds)
        self.routers = nn.ModuleList(
            Router(
                dim,
                config.num_experts,
                gate,
                config.groups,
                confident=config.confidence is not None,
            )
            for _ in range(config.rounds)
        )
        self.exchange: Exchange | None = None
        if isinstance(config.exchange, AttendConfig):
            self.exchange = Exchange(dim, config.exchange.width)
        self.experts = config.expert.build(dim, config.num_experts, config.gate.slots)
        if config.revive is not None:
            self.register_buffer("starved_E", torch.zeros(config.num_experts, dtype=torch.int64))
        self.starved_E: Tensor
        """Steps that each expert has been without work; below 0: steps that it is left alone."""
        self.shared: SwiGLU | None = None
        if config.shared_experts:
            width = config.expert.width(dim, config.gate.slots)
            self.shared = SwiGLU(dim, config.shared_experts * width)

    @property
    def each_router(self) -> list[Router]:
        """The routers, first round first."""
        return [router for router in self.routers if isinstance(router, Router)]

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token does not meet, if it uses all of its slots."""
        of_experts = sum(parameter.numel() for parameter in self.experts.parameters())
        idle = max(0, self.config.num_experts - self.config.gate.slots)
        return of_experts // self.config.num_experts * idle

    @property
    def hidden_dim(self) -> int:
        """Width of an expert's hidden layer."""
        return self.experts.up_EHD.shape[1]

    @torch.no_grad()
    def balance_by(self, loads: Sequence[Tensor], scale: float = 1.0) -> None:
        """Moves the bias of every router against its load of a step that is done.

        Args:
            scale: of the rate; 0: biases stay.
        """
        for one in self.config.balance:
            if isinstance(one, BiasConfig):
                for router, load_E in zip(self.each_router, loads, strict=True):
                    error_E = load_E.mean() - load_E
                    router.bias_E += scale * one.rate * error_E.sign().to(router.bias_E)

    @torch.no_grad()
    def revive(self, load_E: Tensor) -> list[tuple[int, int]]:
        """Replaces experts that stayed without work; (expert, the one it is a copy of) of each.

        Noise is drawn from torch's global generator.
        """
        config = self.config.revive
        if config is None:
            return []
        starving_E = load_E < config.share * load_E.mean()
        # a new copy is given time before it counts as starving
        resting_E = self.starved_E < 0
        self.starved_E.copy_(
            torch.where(
                starving_E | resting_E, self.starved_E + 1, torch.zeros_like(self.starved_E)
            )
        )
        due = (self.starved_E >= config.window).nonzero()[:, 0].tolist()
        # experts with a fair load at least, each once: what is due waits for the next step's
        busy = int((load_E >= load_E.mean()).sum())
        sources = load_E.sort(descending=True, stable=True).indices[:busy].tolist()
        pairs = list(zip(due, sources, strict=False))
        for expert, source in pairs:
            for weight_E in self.rows_of_experts():
                copied = weight_E[source]
                noise = (
                    config.noise
                    * float(copied.float().std(correction=0))
                    * torch.randn(copied.shape)
                )
                weight_E[expert] = copied + noise.to(copied)
            for router in self.each_router:
                router.bias_E[expert] = router.bias_E[source]
            self.starved_E[expert] = -config.cooldown
        return pairs

    def rows_of_experts(self) -> list[Tensor]:
        """The parameters that have one row, or one matrix, for every expert."""
        rows: list[Tensor] = list(self.experts.parameters())
        for router in self.each_router:
            # a gate's noise is by expert, too
            rows += [router.weight_ED, *router.gate.parameters()]
        return rows

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        """The experts' state, one for every round if there are several."""
        states = tuple(
            self.experts.init_state(batch_size, device=device, dtype=dtype)
            for _ in self.each_router
        )
        return states[0] if self.config.rounds == 1 else states

    def forward(self, x_BTD: Tensor, state: Any, ctx: Ctx) -> tuple[Tensor, Any, Ctx]:
        """Every token by its own experts; losses and loads go into `ctx`."""
        x_RD = x_BTD.flatten(0, 1)
        before = (state,) if self.config.rounds == 1 else state
        after, y_RD = [], None
        for router, own in zip(self.each_router, before, strict=True):
            # of several rounds each goes on from what the last one made
            h_RD = x_RD if y_RD is None else x_RD + y_RD
            logits_RE, choice = router(h_RD)
            plan = entries(choice, self.config.num_experts)
            y_MD, own = self.experts(h_RD, plan, own, ctx)
            if self.exchange is not None:
                y_MD = self.exchange(y_MD, choice, plan)
            blend_RD = rows.blend(y_MD, choice.weights_RK, plan.places_RK)
            y_RD = blend_RD if y_RD is None else y_RD + blend_RD
            after.append(own)
            ctx = self._told(logits_RE, choice, ctx)
        assert y_RD is not None
        y_BTD = y_RD.view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, (), ctx)[0]
        return y_BTD, after[0] if self.config.rounds == 1 else tuple(after), ctx

    def _told(self, logits_RE: Tensor, choice: Any, ctx: Ctx) -> Ctx:
        real_R = None if ctx.valid_BT is None else ctx.valid_BT.flatten()
        done = traffic(logits_RE, choice, real_R)
        aux = ctx.aux
        if self.training:
            aux += tuple(
                (one.type, one.loss(done))
                for one in self.config.balance
                if not isinstance(one, BiasConfig)
            )
        routed = Routed(done.load_E, logits_RE.detach(), choice.experts_RK, choice.used_RK)
        return ctx._replace(aux=aux, routed=(*ctx.routed, routed))

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """The routers, the experts of all slots, what they exchange, and the shared one."""
        slots = self.config.gate.slots // self.config.rounds
        flops = sum(router.flops_per_token() for router in self.each_router)
        flops += self.config.gate.slots * self.experts.flops_per_entry(context_len, slots)
        if self.exchange is not None:
            flops += self.exchange.flops_per_token(slots)
        if self.shared is not None:
            flops += self.shared.cost(context_len, value_bytes).flops_per_token
        kept = self.config.rounds * self.experts.state_bytes(context_len, slots, value_bytes)
        again = self.config.gate.slots * self.experts.repeated_per_entry(context_len, slots)
        again += 3 * sum(router.flops_of_noise() for router in self.each_router)
        return Cost(flops, 3 * flops + again, flops, kept)
