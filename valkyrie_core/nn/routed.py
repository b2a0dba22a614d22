"""Several mixers in the place of one, and a router that says which of them a token goes through.

    p = softmax(s / temperature), or sparsemax(s / temperature)         s: the router's scores
    soft:   y = sum over the mixers of p_m scale_m mixer_m(x)           all of them run
    hard:   the same over the mixers that were chosen; no other runs

Training begins soft and grows hard, as its temperature falls; then tokens that a mixer was not
chosen for are no more to it than padding: they change no recurrent state, write no key and cost
nothing. A budget is kept by a price on operations, which rises while they are too many (a
Lagrangian multiplier). Scores are made of the token itself and, smoothed, of those before it. Gates
between mixers under a budget that end as a choice: FlashMorph, arXiv 2606.30562; skipping tokens:
Mixture-of-Depths, 2404.02258, here without a look at later ones; sparsemax: 1602.02068.

The first token of a document goes through all mixers, as it tells them that a document starts.

Shapes: B batch, T time, D model, M mixers, K chosen tokens of a row at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field, model_validator
from torch import Tensor, nn

from valkyrie_core.config import Config
from valkyrie_core.errors import RecipeError
from valkyrie_core.nn.attention import Attention, AttentionConfig
from valkyrie_core.nn.lots import Lots, lots
from valkyrie_core.nn.router_scores import Router
from valkyrie_core.nn.rwkv import RWKV7, RWKV7Config
from valkyrie_core.nn.selection import select
from valkyrie_core.nn.skip import Skip, SkipConfig
from valkyrie_core.nn.sparsemax import sparsemax
from valkyrie_core.nn.state import Cost, Ctx, Mixer, Route

COLDEST = 0.3
"""The temperature at the end of the soft part, and from there on."""


class BudgetConfig(Config):
    """How many operations a layer may take."""

    flops: float = Field(gt=0, le=1)
    """The share of those that it would take if all tokens went through its costliest mixer."""
    rate: float = Field(default=0.02, gt=0)
    """How fast the price rises by step, in nats for all operations, while they are too many."""
    context_len: int = Field(default=512, ge=1)
    """The context at which the mixers' operations are compared."""


Routable = Annotated[AttentionConfig | RWKV7Config | SkipConfig, Discriminator("type")]


class RoutedConfig(Config):
    """A choice among several mixers, token by token."""

    type: Literal["routed"] = "routed"
    mixers: dict[str, Routable] = Field(min_length=2)
    """By name."""
    gate: Literal["softmax", "sparsemax", "lot"] = "softmax"
    """What makes gates of scores. softmax: in the end the best mixer is chosen. sparsemax: all
    whose gates are not zero. lot: a mixer is drawn by a token's position, whatever stands there,
    as often as the budget allows: what a learned router is to be measured by."""
    block_len: int = Field(default=1, ge=1)
    """Tokens that share a decision, which the first of them makes; counted from a document's
    beginning."""
    adaptation: float = Field(default=1.0, gt=0, le=1)
    """How much of the scores is the token's own; the rest is what they were before."""
    confidence_threshold: float = Field(default=0.0, ge=0, lt=1)
    """With softmax: where the best mixer's gate is lower, the second best runs as well."""
    budget: BudgetConfig | None = None
    """How many operations are allowed; left out, choices cost nothing."""
    soft_share: float = Field(default=0.5, ge=0, le=1)
    """The share of training in which all mixers run; 1: to its end."""

    @model_validator(mode="after")
    def _something_is_done(self) -> RoutedConfig:
        if all(isinstance(mixer, SkipConfig) for mixer in self.mixers.values()):
            raise ValueError("every one of the mixers skips")
        if self.gate == "lot" and (self.block_len > 1 or self.adaptation < 1):
            raise ValueError("lots look at no score: leave out block_len and adaptation")
        if self.gate == "lot" and self.soft_share > 0:
            raise ValueError("lots are drawn from the beginning: set soft_share: 0")
        if self.confidence_threshold and self.gate != "softmax":
            raise ValueError("confidence_threshold belongs to gate: softmax")
        return self

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> RoutedMixer:
        """The module this section describes."""
        return RoutedMixer(dim, self, layer_idx=layer_idx, num_layers=num_layers)


class Decision(NamedTuple):
    """What a router says of a window's tokens."""

    gates_BTM: Tensor
    """How much each mixer counts; they sum to one over those that are used."""
    used_BTM: Tensor
    """Which mixers run: those that it means, and of a document's first token all."""
    share_BTM: Tensor
    """As used, with the gradient of the gates."""


class RoutedMixer(nn.Module):
    """A router and its mixers; its state is the router's, then theirs."""

    def __init__(self, dim: int, config: RoutedConfig, *, layer_idx: int, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(config.mixers)
        place = {"layer_idx": layer_idx, "num_layers": num_layers}
        self.mixers = nn.ModuleList(
            # not every token has values of a first layer that chooses
            RWKV7(dim, mixer, **place, mixes_values=False)
            if isinstance(mixer, RWKV7Config)
            else mixer.build(dim, **place)
            for mixer in config.mixers.values()
        )
        M = len(self.mixers)
        self.scale_M = nn.Parameter(torch.ones(M))
        self.register_buffer("softness", torch.tensor(float(config.soft_share > 0)))
        self.softness: Tensor
        """1 at the beginning of training, falling to 0, from where on choices are hard."""
        self.register_buffer("price", torch.zeros(()))
        self.price: Tensor
        """Of operations, in nats for all that the budget counts."""
        self.hard = config.soft_share == 0
        """Whether mixers run for the tokens alone that they were chosen for: softness is 0."""
        self.shares = self._shares()
        self.cheapest = self.shares.index(min(self.shares))
        """What is left for tokens that are sure."""
        most = None if config.budget is None else config.budget.flops
        if most is not None and most < min(self.shares):
            raise RecipeError(
                f"a budget of {most:g} of the costliest mixer's operations can't be kept: the "
                f"cheapest one takes {min(self.shares):.2f}",
                hint="a higher budget.flops, or a mixer that skips",
            )
        self.router: Router | Lots = (
            Lots(self.shares, most)
            if config.gate == "lot"
            else Router(dim, M, adaptation=config.adaptation, block_len=config.block_len)
        )
        self.used = self.router.each if isinstance(self.router, Lots) else (1.0,) * M
        """The share of tokens that each mixer ran for in the last step of training; at first, as
        far as is known."""

    def foreseen(self) -> tuple[float, ...]:
        """The share of tokens that each mixer will run for, over the whole of training: all while
        choices are soft, then what meets the budget; which mixers are chosen nobody knows."""
        budget = self.config.budget
        if budget is None and self.config.gate == "sparsemax":
            return (1.0,) * len(self.shares)
        soft = self.config.soft_share
        chosen = lots(self.shares, None if budget is None else budget.flops)
        return tuple(soft + (1 - soft) * share for share in chosen)

    def _shares(self) -> tuple[float, ...]:
        """The operations of every mixer, the costliest one's being 1."""
        context = BudgetConfig(flops=1).context_len
        if self.config.budget is not None:
            context = self.config.budget.context_len
        each = [mixer.cost(context).flops_per_token for mixer in self.each]
        return tuple(one / max(each) for one in each)

    @property
    def each(self) -> list[Mixer]:
        """The mixers."""
        return list(self.mixers)  # type: ignore[arg-type]

    @staticmethod
    def states_of(state: tuple[Any, ...]) -> tuple[Any, ...]:
        """The mixers' states."""
        return state[2:]

    def score_bytes(self, value_bytes: int = 4) -> int:
        """What the router remembers of a sequence."""
        return 2 * max(value_bytes, 4) * len(self.mixers)

    def anneal(self, done: float) -> None:
        """Grows harder with the share of training that is done."""
        soft = self.config.soft_share
        self.softness.fill_(max(0.0, 1 - done / soft) if soft and done < soft else 0.0)
        if soft == 1:
            # to the end, and at the end
            self.softness.clamp_(min=torch.finfo(self.softness.dtype).tiny)
        self.settle()

    def settle(self) -> None:
        """Does as `softness` says, after it was read from a file."""
        self.hard = float(self.softness) == 0

    @torch.no_grad()
    def charge(self, used_M: Sequence[float]) -> float:
        """Moves the price by what a step took: the shares of tokens that mixers ran for.

        Returns the operations, of those of the costliest mixer for all tokens. While choices are
        soft, they are what the gates would take.
        """
        self.used = tuple(used_M) if self.hard else (1.0,) * len(used_M)
        operations = sum(a * b for a, b in zip(used_M, self.shares, strict=True))
        budget = self.config.budget
        if budget is not None:
            self.price.add_(budget.rate * (operations - budget.flops)).clamp_(min=0)
        return operations

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """Smoothed scores, the scores of the present block, and the mixers' states."""
        precise = torch.promote_types(dtype, torch.float32)
        scores = torch.zeros(batch_size, len(self.mixers), device=device, dtype=precise)
        states = (m.init_state(batch_size, device=device, dtype=dtype) for m in self.each)
        return (scores, scores, *states)

    def forward(
        self, x_BTD: Tensor, state: tuple[Any, ...], ctx: Ctx
    ) -> tuple[Tensor, tuple[Any, ...], Ctx]:
        """Mixes one window of tokens."""
        smooth_BM, held_BM, *states = state
        decision, smooth_BM, held_BM = self._decide(x_BTD, smooth_BM, held_BM, ctx)
        run = self._chosen if self.hard else self._all
        y_BTD, states = run(x_BTD, states, ctx, decision)
        ctx = ctx._replace(routes=(*ctx.routes, self._route(decision, ctx)))
        if self.config.budget is not None and self.training:
            ctx = ctx._replace(aux=(*ctx.aux, ("budget", self._charge(decision, ctx))))
        return y_BTD, (smooth_BM, held_BM, *states), ctx

    def _decide(
        self, x_BTD: Tensor, smooth_BM: Tensor, held_BM: Tensor, ctx: Ctx
    ) -> tuple[Decision, Tensor, Tensor]:
        precise = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BTM, smooth_BM, held_BM = self.router(x_BTD.to(precise), smooth_BM, held_BM, ctx)
            scores_BTM = scores_BTM / self.softness.to(precise).clamp(min=COLDEST)
            if ctx.sure_BT is not None:
                scores_BTM = torch.where(
                    ctx.sure_BT[:, :, None], self._cheapest_alone(scores_BTM), scores_BTM
                )
            decision = self._decision(scores_BTM, ctx)
        return decision, smooth_BM, held_BM

    def _cheapest_alone(self, scores_BTM: Tensor) -> Tensor:
        """Scores by which the cheapest mixer has the whole gate."""
        alone_M = torch.full_like(scores_BTM[0, 0], -torch.inf)
        alone_M[self.cheapest] = 0
        return alone_M.expand_as(scores_BTM)

    def _decision(self, scores_BTM: Tensor, ctx: Ctx) -> Decision:
        if self.config.gate == "sparsemax":
            gates_BTM = sparsemax(scores_BTM)
            used_BTM = gates_BTM > 0
        else:
            gates_BTM = scores_BTM.softmax(-1)
            best = gates_BTM.topk(2, dim=-1)
            used_BTM = torch.zeros_like(gates_BTM, dtype=torch.bool)
            used_BTM = used_BTM.scatter(-1, best.indices[..., :1], True)
            unsure_BT1 = best.values[..., :1] < self.config.confidence_threshold
            second_BTM = torch.zeros_like(used_BTM).scatter(-1, best.indices[..., 1:], True)
            used_BTM = used_BTM | (second_BTM & unsure_BT1)
        if not self.hard:
            return Decision(gates_BTM, torch.ones_like(used_BTM), gates_BTM)
        kept_BTM = gates_BTM * used_BTM
        # the sum is one, and yet gates learn
        total_BT1 = kept_BTM.sum(-1, keepdim=True).detach()
        # a document's first token tells all mixers that it starts, and costs what that costs
        used_BTM = used_BTM | ctx.first_BT[:, :, None]
        share_BTM = used_BTM + gates_BTM - gates_BTM.detach()
        return Decision(kept_BTM / total_BT1, used_BTM, share_BTM)

    def _all(
        self, x_BTD: Tensor, states: list[Any], ctx: Ctx, decision: Decision
    ) -> tuple[Tensor, list[Any]]:
        y_BTD, after = torch.zeros_like(x_BTD), []
        for number, (mixer, state) in enumerate(zip(self.each, states, strict=True)):
            own_BTD, state, _ = mixer(x_BTD, state, ctx)
            y_BTD = y_BTD + self._weighted(own_BTD, decision.gates_BTM[..., number], number)
            after.append(state)
        return y_BTD, after

    def _chosen(
        self, x_BTD: Tensor, states: list[Any], ctx: Ctx, decision: Decision
    ) -> tuple[Tensor, list[Any]]:
        y_BTD, after = torch.zeros_like(x_BTD), []
        for number, (mixer, state) in enumerate(zip(self.each, states, strict=True)):
            active_BT = decision.used_BTM[..., number]
            if ctx.valid_BT is not None:
                active_BT = active_BT & ctx.valid_BT
            chosen = select(active_BT)
            if chosen.index_BK.shape[1] and not isinstance(mixer, Skip):
                own_BKD, state, _ = mixer(chosen.take(x_BTD), state, chosen.context(ctx))
                gates_BK = chosen.take(decision.gates_BTM[..., number])
                own_BKD = self._weighted(own_BKD, gates_BK, number)
                y_BTD = chosen.put(y_BTD, chosen.take(y_BTD) + own_BKD)
            after.append(state)
        return y_BTD, after

    def _weighted(self, y_BTD: Tensor, gates_BT: Tensor, number: int) -> Tensor:
        return y_BTD * (gates_BT * self.scale_M[number]).to(y_BTD.dtype)[..., None]

    def _charge(self, decision: Decision, ctx: Ctx) -> Tensor:
        assert self.config.budget is not None
        shares_M = _mean(decision.share_BTM, ctx)
        over = (shares_M * shares_M.new_tensor(self.shares)).sum() - self.config.budget.flops
        return self.price.to(over.dtype) * over

    def _route(self, decision: Decision, ctx: Ctx) -> Route:
        share_BTM = decision.share_BTM.detach()
        return Route(decision.gates_BTM.detach(), decision.used_BTM, _mean(share_BTM, ctx))

    def settled(self, state: tuple[Any, ...], segment_B: Tensor, pos_B: Tensor) -> tuple[Any, ...]:
        """The state without keys that no later token sees; see `Attention.settled`."""
        smooth_BM, held_BM, *states = state
        kept = (
            mixer.settled(one, segment_B, pos_B) if isinstance(mixer, Attention) else one
            for mixer, one in zip(self.mixers, states, strict=True)
        )
        return (smooth_BM, held_BM, *kept)

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """Of the tokens that mixers ran for in the last step; at first, of those in `used`."""
        # a mixer's context is the tokens that it ran for; what is kept may be all of them
        each = [
            mixer.cost(max(1, round(share * context_len)), value_bytes)
            for mixer, share in zip(self.each, self.used, strict=True)
        ]
        kept = [mixer.cost(context_len, value_bytes).state_bytes for mixer in self.each]
        router, smoothing = self.router.flops(context_len)

        def used(operations: Sequence[int]) -> int:
            return round(sum(a * b for a, b in zip(self.used, operations, strict=True)))

        return Cost(
            router + smoothing + used([one.flops_per_token for one in each]),
            3 * router + 2 * smoothing + used([one.training_flops for one in each]),
            router + used([one.decode_flops for one in each]),
            self.score_bytes(value_bytes) + sum(kept),
        )


def _mean(share_BTM: Tensor, ctx: Ctx) -> Tensor:
    """[M], over the real tokens."""
    if ctx.valid_BT is None:
        return share_BTM.mean((0, 1))
    real_BT1 = ctx.valid_BT[:, :, None].to(share_BTM.dtype)
    return (share_BTM * real_BT1).sum((0, 1)) / real_BT1.sum().clamp(min=1)
