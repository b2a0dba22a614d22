"""What generating, talking and reading answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report
from valkyrie_core.report.formats import Weights


class Sampling(Part):
    """How tokens were drawn."""

    temperature: float
    """0: always the most likely token."""
    top_p: float
    """Only the most likely tokens that together have this probability."""
    top_k: int | None
    """Only this many of the most likely tokens."""
    repetition_penalty: float
    """Divides the logits of tokens that occurred; 1: off."""
    seed: int
    """Fixes the draw."""
    max_tokens: int
    """The longest answer."""


class GenerateReport(Report):
    """One continuation."""

    schema_: Literal["valkyrie.generate/1"] = Field(default="valkyrie.generate/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint."""
    prompt: str
    """What was continued."""
    text: str
    """The continuation."""
    prompt_tokens: int
    """Tokens of the prompt."""
    tokens: int
    """Tokens of the continuation."""
    stopped_by: Literal["end", "max_tokens"]
    """end: the model ended the document."""
    seconds: float
    """Seconds for prompt and continuation."""
    tokens_per_second: float | None
    """Speed after the first token, which waits for the prompt."""
    weights: Weights = "fp32"
    """The format of the matrices."""
    sampling: Sampling
    """How tokens were drawn."""


class ChatTurn(Part):
    """One message and its answer."""

    message: str
    """What was said."""
    answer: str
    """What the model answered."""
    prompt_tokens: int
    """New tokens that the turn fed to the model: the message, not the history."""
    tokens: int
    """Tokens of the answer."""
    seconds: float
    """How long the turn took."""


class ChatReport(Report):
    """A conversation from piped input."""

    schema_: Literal["valkyrie.chat/1"] = Field(default="valkyrie.chat/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint."""
    answer: str
    """The last answer."""
    tokens: int
    """Tokens of all answers."""
    prompt_tokens: int
    """Tokens of all messages."""
    seconds: float
    """How long all turns took."""
    turns: list[ChatTurn]
    """All turns."""
    weights: Weights = "fp32"
    """The format of the matrices."""
    sampling: Sampling
    """How tokens were drawn."""


class ReadReport(Report):
    """A text that was read, and the state that was kept after it."""

    schema_: Literal["valkyrie.read/1"] = Field(default="valkyrie.read/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint."""
    text: str
    """The file that was read."""
    tokens: int
    """Its tokens, with the marker that begins a document."""
    total_tokens: int
    """Tokens that the state has read."""
    seconds: float
    """How long the reading took."""
    tokens_per_second: float
    """Tokens read per second."""
    state_bytes: int
    """Memory of the state."""
    file: str
    """Where the state is."""
    file_bytes: int
    """Size of that file."""
    weights: Weights
    """The format of the matrices."""
