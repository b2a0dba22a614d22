"""What reading a long text answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report
from valkyrie_core.report.formats import Weights


class PositionScore(Part):
    """The loss of the tokens at some positions of a text that was read from its beginning."""

    start: int
    """The first of the positions; that of the text's first token is 0."""
    end: int
    """The position after the last."""
    bpb: float | None
    """Bits per byte; None where the tokens stand for no text."""


class ContextScore(Part):
    """The loss of the targets, which are the same for every context."""

    context: int
    """Tokens that were read before the first target of a stretch."""
    bpb: float
    """Bits per byte."""


class LengthCost(Part):
    """What reading cost up to a length."""

    length: int
    """Tokens read."""
    tokens_per_second: float
    """Since the length before."""
    peak_bytes: int | None
    """The most memory that the process held so far; None where the system does not tell."""
    state_bytes: int
    """Of the recurrent layers' states."""
    cache_bytes: int
    """Of attention's keys and values."""
    snapshot_bytes: int
    """Of a state that is kept by itself: what a state file holds."""


class RecallScore(Part):
    """Whether facts in a text of some length are found."""

    task: Literal["passkey", "needles", "mqar", "variables"]
    """What was asked; see `valkyrie_core.evaluate.recall`."""
    length: int
    """Tokens of the text, the question not counted."""
    depth: float | None
    """Where the fact stands, from 0 (first) to 1 (last); None: all depths together."""
    questions: int
    """How many were asked."""
    first: float
    """The share of questions whose right answer is the likeliest candidate."""
    mean_rank: float
    """Of the right answer among the candidates; 0 is the best."""
    written: float
    """The share of right answers that the model writes by itself."""
    chance: float
    """The share that guessing among the candidates gets."""
    constant: float
    """The share that one word gets, the best one for all lengths of the task."""


class EffectiveContext(Part):
    """The longest context at which more context still lowered the loss."""

    tokens: int
    """Longer contexts are not surely better than this one; this one is than shorter ones."""
    low: int
    """In 90 % of the resamples the best context is between this one ..."""
    high: int
    """... and this one."""


class LongReading(Part):
    """What a model made of one long text."""

    by_position: list[PositionScore]
    """Read once from the beginning, the state carried."""
    by_context: list[ContextScore]
    """The same targets from contexts of several lengths."""
    targets: int
    """Tokens that every context is scored on."""
    stretches: int
    """Places of the text that they come from."""
    effective_length: EffectiveContext
    """How much context helps."""
    recall: list[RecallScore]
    """Facts that were found, by task, length and depth."""
    memory: list[LengthCost]
    """Speed and memory by length."""


class LongContextReport(LongReading):
    """One long text: losses by position and by context, recall, speed and memory by length."""

    model_config = Report.model_config

    schema_: Literal["valkyrie.long_context/1"] = Field(
        default="valkyrie.long_context/1", alias="schema"
    )
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint that was read."""
    parameters: int
    """Parameters of the model."""
    text: str
    """What was read."""
    text_tokens: int
    """Tokens of the whole text."""
    seen_in_training: bool = False
    """Whether the run was trained on parts of this text."""
    context: int
    """The longest context, and how many tokens were read from the beginning."""
    trained_context: int
    """Tokens of the longest training window up to the step that was read."""
    chunk: int
    """Tokens that were read at once."""
    precision: str
    """What the matrix products were computed in."""
    weights: Weights
    """The format of the matrices."""
    changes: dict[str, int | float | str] = Field(default_factory=dict)
    """What was changed in the run's model: kv_window, kv_dtype, state_dtype, yarn."""
    as_trained: LongReading | None = None
    """The same without these changes: their price; None without changes."""
    seconds: float
    """How long all of it took."""

    @property
    def how_far(self) -> str:
        """The effective length in words, and no more than was measured."""
        best, contexts = self.effective_length, self.by_context
        if len(contexts) < 2 or self.stretches < 2:
            return (
                "How far context helps: nothing to compare (one length, or one stretch of targets)."
            )
        where = f"in 90 % of the resamples the best lies between {best.low:,} and {best.high:,}"
        if best.tokens == contexts[0].context:
            return f"No context longer than {best.tokens:,} tokens is surely better ({where})."
        return f"More context surely helps up to {best.tokens:,} tokens ({where})."
