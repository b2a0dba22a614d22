"""What `valkyrie allocate` answers: the stack, a search over layouts, the importance of layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class LayerPicture(Part):
    """One layer; or, without a number, what stands before and after the layers."""

    layer: int | None
    """From 0; None for the embedding and the head."""
    block: str
    """The block's name in the recipe."""
    mixer: str
    """The token mixer's type; empty for embedding and head."""
    ffn: str
    """The channel mixer's type."""
    position: str
    """How attention knows positions; empty for recurrent layers."""
    window: int | None
    """How many last tokens attention sees; None: all."""
    parameters: int
    """The row's own, norms included."""
    flops: int
    """Forward and backward operations per token of training, averaged over the context."""
    flops_share: float
    """Its share of the model's."""
    state_bytes: int
    """Of one sequence after the context: keys and values in bf16, recurrent states in fp32."""


class StackPicture(Part):
    """A model, layer by layer."""

    pattern: str
    """The layers' blocks, as a pattern is written."""
    parameters: int
    """All of them; the rows' add up to it."""
    flops_per_token: int
    """Training FLOPs per token; the rows' add up to it."""
    state_bytes: int
    """The sum of the rows'."""
    rows: list[LayerPicture]
    """Embedding, layers, head."""


class MatchedSize(Part):
    """How a design was brought to the original's size."""

    match: Literal["params", "flops"]
    """What is kept: parameters, or training FLOPs per token."""
    wanted: int
    """The original's."""
    before: int
    """The design's before its ffns were resized."""
    after: int
    """And after."""
    difference: float
    """What remains, as a share of the original's."""
    hidden_dims: dict[str, tuple[int, int]]
    """Of every block's ffn, before and after."""


class AllocateReport(Report):
    """The stack of a recipe; with a design asked for, that of the design too."""

    schema_: Literal["valkyrie.allocate/1"] = Field(default="valkyrie.allocate/1", alias="schema")
    recipe: str
    """The recipe's name."""
    context_len: int
    """Tokens of a training sequence: what FLOPs and states are counted over."""
    stack: StackPicture
    """What the recipe says."""
    asked: str | None = None
    """The design that was asked for."""
    design: StackPicture | None = None
    """The layers rearranged."""
    notes: list[str] = Field(default_factory=list)
    """What was decided, derived and resized."""
    size: MatchedSize | None = None
    """With --match: sizes before and after."""
    out: str | None = None
    """The recipe that was written."""


class Estimate(Part):
    """A mean over seeds."""

    mean: float | None
    """None where a training diverged."""
    half_width: float | None
    """Student's 95 % interval reaches so far to each side; None for one seed."""
    seeds: int
    """How many trainings."""


class CandidateScore(Part):
    """One layout, at its last rung."""

    candidate: str
    """A letter a layer: R recurrent, A attention, W attention with the recipe's window."""
    rung: int
    """The last rung that it reached, from 1."""
    is_baseline: bool
    """Whether all layers are alike."""
    bpb: Estimate
    """Bits per byte of the held-out text, of the proxy."""
    recall: Estimate
    """The share of MQAR queries that the proxy answers, all numbers of pairs alike."""
    recall_by_pairs: dict[int, float]
    """The same by number of pairs, mean over seeds."""
    decode_bytes: int
    """Read for one token after 16,384, at full width: bf16 weights, keys and values, fp32 states.
    By formula."""
    training_flops: int
    """Per token, at full width. By formula."""
    pareto: bool
    """Whether no other candidate of its rung is better in one of the four and as good in all."""


class SearchReport(Report):
    """A search over layouts by short trainings of small models."""

    schema_: Literal["valkyrie.allocate.search/1"] = Field(
        default="valkyrie.allocate.search/1", alias="schema"
    )
    recipe: str
    """The recipe's name."""
    folder: str
    """Where every training's result lies."""
    candidates: list[CandidateScore]
    """Those of the last rung first."""
    chosen: str | None
    """None: not enough evidence."""
    reason: str
    """Why this one, or why none."""
    seeds_needed: int | None
    """Where the evidence does not suffice: how many seeds may, if spreads stay as they are."""
    rules: list[str]
    """How candidates went on and how one was chosen."""
    budget: dict[str, int]
    """Widths, steps and tokens of the proxies."""
    proxy_parameters: dict[str, tuple[int, int]]
    """Fewest and most parameters among the proxies of a task."""
    trainings: int
    """How many there were."""
    training_seconds: float
    """Of all trainings together, whenever they ran."""
    out: str | None
    """The recipe that was written."""


class LayerImportance(Part):
    """What one layer's mixer does for the predictions."""

    layer: int
    """From 0."""
    block: str
    """The block's name in the recipe."""
    mixer: str
    """The token mixer's type."""
    change: Literal["windowed", "removed"]
    """Attention saw the last tokens only, or the mixer's output was zero."""
    kl: float
    """KL(original || changed) of the next token, nats per token, mean."""
    low: float
    """In 95 % of the resamples of the windows of text the mean lies above this ..."""
    high: float
    """... and below this."""


class ImportanceReport(Report):
    """Which layers' mixers the predictions depend on."""

    schema_: Literal["valkyrie.allocate.importance/1"] = Field(
        default="valkyrie.allocate.importance/1", alias="schema"
    )
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint that was read."""
    window: int
    """Tokens that windowed attention saw, besides its sinks."""
    context_len: int
    """Tokens of a window of text."""
    windows: int
    """Windows of validation text."""
    tokens: int
    """Tokens whose predictions were compared."""
    layers: list[LayerImportance]
    """In the order of the layers."""
    could_become_recurrent: list[int]
    """Attention layers, the one that a window changes least first."""
    seconds: float
    """How long it took."""
