"""What training answers; it is report.json in a run as well."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class SplitCounts(Part):
    """How much text one split of a corpus holds."""

    documents: int
    """Documents."""
    tokens: int
    """Tokens, with one document marker per document."""
    bytes: int
    """UTF-8 bytes of the text."""
    bytes_per_token: float | None
    """How much text one token stands for."""


class CorpusCounts(Part):
    """What became of one corpus."""

    train: SplitCounts
    """What is trained on."""
    validation: SplitCounts
    """What is held out."""
    dropped: dict[str, int] = Field(default_factory=dict)
    """Documents that were left out, by reason."""
    truncated: int = 0
    """Documents that were cut."""


class StepCost(Part):
    """What an optimizer step costs."""

    seconds_per_step: float | None
    """Seconds, the first step of a sitting not counted."""
    peak_bytes: int | None
    """The most memory that the process holds."""


class TrainReport(Report):
    """What a training run did; also report.json in its directory."""

    schema_: Literal["valkyrie.train/1"] = Field(default="valkyrie.train/1", alias="schema")
    run: str
    """The run's name."""
    directory: str
    """The run's directory."""
    steps: int
    """Optimizer steps done, all sittings together."""
    total_steps: int
    """The horizon of the schedule."""
    finished: bool
    """Whether all steps are done."""
    tokens_seen: int
    """Training tokens read, all sittings together."""
    seconds: float
    """Seconds of training (validation and checkpoints left out), all sittings together."""
    tokens_per_second: float | None
    """Training tokens per second of training."""
    train_loss: float | None
    """Mean loss of the last logged steps, in nats per token."""
    val_bpb: float | None
    """Validation bits per byte at the end, all corpora's bytes together."""
    val_bpb_by_corpus: dict[str, float] = Field(default_factory=dict)
    """Validation bits per byte at the end, by corpus."""
    best_val_bpb: float | None = None
    """The best validation of the run."""
    best_step: int | None = None
    """The step of the best validation."""
    parameters: int
    """Trainable parameters."""
    device: str
    """Where it ran."""
    precision: str
    """What the matrix products were computed in."""
    threads: int
    """Processor threads."""
    kernels: dict[str, str] = Field(default_factory=dict)
    """Which implementation computed what."""
    mfu: float | None = None
    """Model FLOPs per second as a share of this machine's measured matmul peak."""
    peak_flops: float | None = None
    """The measured matmul peak, in FLOP per second."""
    predicted: StepCost | None = None
    """What the plan said of this sitting; None where it was too short to ask, or only resumed."""
    measured: StepCost | None = None
    """What this sitting took; validations and checkpoints count in its memory."""
    checkpoint: str | None = None
    """The newest checkpoint."""
    data_fingerprint: str | None = None
    """Identifies the packed data."""
    corpora: dict[str, CorpusCounts] = Field(default_factory=dict)
    """Counts of the data, by corpus."""
