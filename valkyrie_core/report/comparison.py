"""What `valkyrie compare` answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class Difference(Part):
    """One contender's mean score less the reference's, and what is known of it.

    None: one seed, or one item, can't tell.
    """

    value: float
    """Over seeds, of items by their weight."""
    low: float | None
    """The 95 % interval, over other seeds and other items."""
    high: float | None
    """Likewise."""
    p: float | None
    """Of a difference as large if there were none, over other seeds and other items."""
    p_holm: float | None
    """The same, corrected for all metrics and contenders."""
    p_items: float | None
    """For these very models and other items alone: signs of the items are flipped."""
    from_seeds: float | None
    """The share of the squared standard error that the seeds make; the rest is the items'."""
    effect_size: float | None
    """The mean over the standard deviation of the seeds' means."""
    detectable: float | None
    """The smallest true difference that this comparison finds with a power of 80 %."""
    seeds_needed: int | None
    """Seeds that would find a difference like this one with that power; None: more than 1,000, or
    more items first."""


class ComparedMetric(Part):
    """One number that designs are compared by."""

    name: str
    """`bits per byte` or `accuracy`, or that of one corpus: `bits per byte: plays`."""
    unit: Literal["bits per byte", "accuracy"]
    """What is counted."""
    contender: str
    """The design that is set against the reference."""
    lower_is_better: bool
    """Which way is better."""
    items: int
    """Documents, or stretches of them."""
    seeds: int
    """Pairs of trainings."""
    reference_mean: float
    """The reference's score."""
    contender_mean: float
    """The contender's."""
    constant_answer: float | None
    """The accuracy of one answer for all questions of a corpus; None for bits."""
    mcnemar: list[float] | None
    """The exact p of each pair of models, by seed: of these models alone; None for bits."""
    difference: Difference
    """Contender less reference."""
    outcome: Literal["better", "worse", "not enough evidence"]
    """Of the contender; after Holm's correction."""


class ComparedDepths(Part):
    """What a design with loops or steps scores at each of them; means over seeds."""

    by_depth: dict[int, float]
    """The share of right answers where every question is thought about for so long."""
    ended: dict[int, float]
    """The share of tokens, or of questions, that its recipe's rule ends there; empty without."""
    early: float | None
    """The share of right answers with the rule; None without."""


class ComparedDesign(Part):
    """One contender, as it was trained."""

    name: str
    """Its name in this comparison."""
    source: str
    """The recipe or run that was named."""
    parameters: int
    """All of them."""
    active_parameters: int
    """Those that a token meets."""
    unrolled_parameters: int
    """Of as many plain layers as there are passes: more than all where layers are looped."""
    steps: int
    """Optimizer steps of each training."""
    tokens: int
    """Training tokens of each."""
    training_flops: int
    """Of each training, by formula."""
    runs: list[str]
    """Directories of its trainings, a seed each."""
    seeds: list[int]
    """Their seeds."""
    score: float
    """Bits per byte, mean over seeds."""
    scores: list[float]
    """By seed."""
    primary: list[float]
    """By seed, what the verdict is about: right answers where all corpora ask questions, else bits
    per byte."""
    accuracy: dict[str, dict[int, float]]
    """By corpus of questions and level of difficulty, mean over seeds."""
    depths: dict[str, ComparedDepths] = Field(default_factory=dict)
    """By corpus of questions, of a design that has some."""


class DroppedDesign(Part):
    """A design that was not trained to the end."""

    name: str
    """Its name in this comparison."""
    source: str
    """The recipe that was named."""
    why: str
    """What it scored when it was dropped, or that it diverged."""
    by_score: bool
    """Whether the former."""


class ComparedView(Part):
    """One way to call two designs equal."""

    matched: bool
    """Whether trainings are equal in this, within 2 %."""
    values: dict[str, float | None]
    """By contender; None where the number is in `timing`."""
    difference_at_equal: dict[str, float | None]
    """By contender, bits per byte less the reference's where both had spent as much: read off the
    validation curves at the smaller of both budgets. The one that is cut short had not finished its
    schedule. None: the curves do not reach there, or the number is in `timing`."""


class ComparisonTiming(Part):
    """Everything that was measured with a clock."""

    step_seconds: dict[str, float]
    """By contender, of one step, side by side before the trainings."""
    training_seconds: dict[str, list[float]]
    """By contender and seed."""
    difference_at_equal_seconds: dict[str, float | None]
    """As `difference_at_equal`, by the seconds of steps."""
    seconds: float = 0.0
    """Of the whole command, in this sitting."""
    machine: str = ""
    """Processor, threads and torch's version."""
    date: str = ""
    """Of this report, UTC."""


class CompareReport(Report):
    """Which design is better, on what evidence, at which cost."""

    schema_: Literal["valkyrie.compare/1"] = Field(default="valkyrie.compare/1", alias="schema")
    verdict: str
    """One sentence."""
    reference: str
    """The contender that the others are set against."""
    match: Literal["tokens", "params", "flops", "seconds"]
    """What trainings have in common."""
    seeds: int
    """Trainings of each contender."""
    precision: Literal["fp32", "bf16"]
    """In which all were scored, and the reference was trained."""
    contenders: list[ComparedDesign]
    """The reference first."""
    dropped: list[DroppedDesign]
    """Designs that diverged, or that the budget had no room for."""
    metrics: list[ComparedMetric]
    """Bits per byte of everything first, then by corpus."""
    views: dict[Literal["params", "flops", "seconds"], ComparedView]
    """The same under every way to call designs equal."""
    notes: list[str]
    """What was changed to compare, and what a reader should know."""
    directory: str
    """Where the comparison lies."""
    timing: ComparisonTiming
    """The only part that differs when the same is done again."""
