"""What evaluating on held-out text answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report
from valkyrie_core.report.formats import Weights


class Accuracy(Part):
    """Right answers to a corpus's held-out questions."""

    share: float
    """Of all; an answer is right as a whole, up to its end, as greedy decoding gives it."""
    questions: int
    """How many were asked."""
    by_difficulty: dict[int, float]
    """The share by level."""
    constant_answer: float
    """The share that one answer for all gets right."""


class HaltingScore(Part):
    """What a rule that ends thought early saves, and what it costs."""

    rule: str
    """The rule, with its threshold."""
    then: Literal["halt", "cheapest"] = "halt"
    """What becomes of what is done: it ends, or its tokens go on through the routers' cheapest
    mixers, and its depth is where that began."""
    calibrated_risk: float | None
    """What `valkyrie calibrate` promised, where the threshold is that of it."""
    score: float
    """By the measure of the depths, with the rule."""
    full_score: float
    """Likewise, at full depth."""
    reasoning_steps: float
    """Mean depth."""
    halt_rate: float
    """The share that ended before full depth."""
    steps: dict[int, float]
    """The share that ended at each depth."""
    seconds: float
    """Of the fastest of some passes over the first questions, or over beginnings of documents."""
    full_seconds: float
    """Likewise, at full depth, in turns with the others."""


class MemoryScore(Part):
    """What an episodic memory of verified answers saves."""

    threshold: float
    """The least cosine of two questions that are near."""
    hits: int
    """Questions that were answered by an earlier one's answer, which held."""
    refused: int
    """Questions whose nearest one's answer did not hold for them."""
    misses: int
    """Questions without a near one."""
    stored: int
    """Verified answers at the end."""
    share: float
    """Of right answers."""
    reasoning_steps: float
    """Mean steps of a question; a hit takes one."""


class ThinkingScore(Part):
    """How much thought answers take: loops of tokens, or steps of questions."""

    unit: Literal["loops of a token", "steps of a question"]
    measure: Literal["right answers", "bits per byte"]
    full_depth: int
    """As in training."""
    by_depth: dict[int, float]
    """The measure where everything is thought about for so long and no longer."""
    calibration_error: float | None
    """Expected calibration error of the learned confidence, over all depths; None without."""
    brier: float | None
    """Its mean squared error."""
    q_halt_mean: float | None
    """The mean confidence, over all depths."""
    q_continue_mean: float | None
    """The mean of what going on is said to be worth, where that is learned."""
    halting: HaltingScore | None
    """Of a rule, where one is asked for, calibrated, or in the recipe."""


class CorpusScore(Part):
    """How well a model predicts one validation corpus."""

    bpb: float
    """Bits per UTF-8 byte of the scored text; lower is better."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored text."""
    documents: int
    """Validation documents."""
    baselines: dict[str, float | None]
    """Bits per byte of what needs no model: uniform, unigram, xz, xz_given_training."""
    fp32_bpb: float | None = None
    """Bits per byte of the weights as trained, computed in fp32; where others were asked for."""
    weights_cost_bpb: float | None = None
    """What the format of the weights and its arithmetic cost: bpb - fp32_bpb."""
    accuracy: Accuracy | None = None
    """Of a corpus of questions."""
    thinking: ThinkingScore | None = None
    """Of a model with loops or steps."""
    memory: MemoryScore | None = None
    """Of a canvas, where it is asked for."""
    notes: list[str] = Field(default_factory=list)
    """What limits a number, such as a baseline that read only a part of the training text."""


class EvalReport(Report):
    """Bits per byte on every validation corpus, with baselines."""

    schema_: Literal["valkyrie.eval/1"] = Field(default="valkyrie.eval/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint that was read."""
    parameters: int
    """Parameters of the model."""
    context: Literal["window", "carried"]
    """What a token was predicted from: a window of context_len, or all of its document so far."""
    context_len: int
    """Tokens per window."""
    precision: str
    """What the matrix products were computed in."""
    weights: Weights = "fp32"
    """The format of the matrices."""
    seconds: float
    """How long the evaluation took."""
    corpora: dict[str, CorpusScore]
    """The scores, by corpus."""
