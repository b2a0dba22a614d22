"""What building and scoring a tokenizer answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class TokenizerBuildReport(Report):
    """A tokenizer that was built."""

    schema_: Literal["valkyrie.tokenizer.build/1"] = Field(
        default="valkyrie.tokenizer.build/1", alias="schema"
    )
    directory: str
    """Where it was written."""
    kind: str
    """Its type."""
    vocab_size: int
    """Number of token ids."""
    fingerprint: str
    """sha256 of what it is."""
    documents: int
    """Training documents that were there to read; 0 where nothing is trained."""
    seconds: float
    """How long it took."""


class TokenizerScore(Part):
    """How a tokenizer does on one corpus."""

    documents: int
    """Documents."""
    bytes: int
    """UTF-8 bytes."""
    tokens: int
    """Tokens."""
    bytes_per_token: float | None
    """How much text one token stands for."""
    train_bytes_per_token: float | None
    """The same in the training text."""
    validation_bytes_per_token: float | None
    """The same in the validation text, which the tokenizer has not seen."""
    round_trips: int
    """Documents that come back exactly."""


class TokenizerEvalReport(Report):
    """What a tokenizer does to text, and what it costs."""

    schema_: Literal["valkyrie.tokenizer.eval/1"] = Field(
        default="valkyrie.tokenizer.eval/1", alias="schema"
    )
    kind: str
    """Its type."""
    vocab_size: int
    """Number of token ids."""
    fingerprint: str
    """sha256 of what it is."""
    corpora: dict[str, TokenizerScore]
    """Scores by corpus, training and validation text together."""
    hostile: dict[str, bool]
    """Exact round trip of hostile texts, by name."""
    exact: bool
    """Everything came back exactly."""
    embedding_parameters: int
    """Parameters of embedding and head in the recipe's model."""
    parameters_share: float | None
    """Their share of all parameters."""
