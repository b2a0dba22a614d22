"""What `valkyrie experts` answers: how a run uses its experts, and what each of them is worth."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class DomainText(Part):
    """One of the texts that were read."""

    name: str
    """A corpus of the recipe, or a file."""
    tokens: int
    """That routers were watched on."""
    windows: int
    """In which they were read."""
    documents: int
    """From which they are."""
    knock_out_tokens: int
    """Scored tokens of the windows that experts were removed on; 0: none was."""


class DeadExpert(Part):
    """An expert with less than a tenth of a fair load."""

    expert: int
    """From 0."""
    load: float
    """Over a fair one."""
    steps: int | None
    """Of training since the last logged one in which it was alive; None: loads were not logged."""


class MutualInformation(Part):
    """I(expert; domain) / H(domain): 0 if domains are routed alike, 1 if a choice tells its own."""

    value: float
    """On this text; some of it is chance."""
    null_mean: float | None
    """Where the windows' domains are shuffled; None: too few windows to tell."""
    null_95: float | None
    """The 95th percentile of the same."""


class TokenLift(Part):
    """A kind of token that an expert is fond of."""

    token: int
    """Its id."""
    text: str
    """What it stands for; escaped where it can't be printed."""
    count: int
    """How many of them the expert met."""
    lift: float
    """Its share of these tokens over its share of all."""


class KnockOut(Part):
    """What removing one expert does to a domain, an entry for every expert."""

    domain: str
    """The domain's name."""
    change: list[float]
    """Of the loss in nats per token; more is worse without the expert."""
    low: list[float | None]
    """Of the 95 % intervals, by a bootstrap over the windows; None: too few windows."""
    high: list[float | None]
    """Likewise."""
    specialisation: float | None
    """The Gini index of the changes: 0 if all experts matter alike, 1 if one alone does."""


class LayerExperts(Part):
    """One layer's routing. None: there was not enough to tell."""

    layer: int
    """From 0."""
    block: str
    """The block's name in the recipe."""
    gate: str
    """The gate's type."""
    num_experts: int
    """That its routers choose among."""
    top_k: int
    """The most that a token meets, all rounds together."""
    rounds: int
    """How often a token is routed; what follows is of all rounds together."""
    load: list[float] | None
    """Load over a fair one by expert: 1 is fair, 0 is dead."""
    load_min: float | None
    """The least of them."""
    load_max: float | None
    """The greatest."""
    load_cv: float | None
    """Their coefficient of variation."""
    max_vio: float | None
    """(largest load - mean) / mean, over the whole text."""
    max_vio_per_batch: float | None
    """The same of a batch (see `batch_windows`), mean over batches."""
    load_entropy: float | None
    """Of the load, over ln of the number of experts: 1 is even."""
    effective_experts: float | None
    """exp of the load's entropy."""
    dead: list[DeadExpert] | None
    """Those with less than a tenth of a fair load."""
    experts_per_token: float
    """How many a token met, mean."""
    routing_entropy: float
    """Of a token's affinities in nats, mean; 0 is sure, ln of the number of experts is not."""
    top1_margin: float
    """The greatest affinity of a token less the second one, mean; all of them sum to 1."""
    mutual_information: MutualInformation | None
    """Of experts and domains; None for one domain."""
    co_activation: list[list[float | None]] | None
    """How often two experts meet one token, over chance; None if a token meets one at a time."""
    top_tokens: list[list[TokenLift]]
    """By expert, the tokens of the greatest lift first."""
    knock_out: list[KnockOut] | None
    """By domain; None if it was not asked for or can't be done."""
    knock_out_note: str | None = None
    """What limits them in this layer."""


class EarlierRouting(Part):
    """What routers of an earlier checkpoint had already decided."""

    step: int
    """Of the earlier checkpoint."""
    share: list[float | None]
    """By layer: the share of a token's experts at the newest checkpoint that it chose as well."""


class RouterSaturation(Part):
    """How much of the newest checkpoint's routing was there before."""

    newest: int
    """The newest checkpoint's step."""
    tokens: int
    """That routers were compared on."""
    earlier: list[EarlierRouting]
    """The other checkpoints on disk, newest first."""


class ExpertsReport(Report):
    """How a run uses its experts."""

    schema_: Literal["valkyrie.experts/1"] = Field(default="valkyrie.experts/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """Of the checkpoint."""
    parameters: int
    """All of them."""
    context_len: int
    """Tokens of a window."""
    batch_windows: int
    """Windows of a batch, all of one domain."""
    precision: Literal["fp32", "bf16"]
    """The arithmetic of the matrix products."""
    seed: int
    """Of shuffles and bootstraps."""
    shuffles: int
    """Behind the null of the mutual information."""
    domains: list[DomainText]
    """What was read."""
    layers: list[LayerExperts]
    """Those with experts, first layer first."""
    saturation: RouterSaturation | None
    """None if there is one checkpoint."""
    notes: list[str]
    """What a reader should know."""
    seconds: float
    """Wall-clock time."""

    @property
    def num_dead(self) -> int:
        """Dead experts of all layers; of those that can tell."""
        return sum(len(layer.dead or ()) for layer in self.layers)

    @property
    def tells_dead(self) -> bool:
        """Whether every layer met enough tokens to say who is dead."""
        return all(layer.dead is not None for layer in self.layers)
