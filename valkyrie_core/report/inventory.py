"""What listing and showing runs answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class RunSummary(Part):
    """One run in a list."""

    run: str
    """The run's name."""
    directory: str
    """Its directory."""
    state: Literal["finished", "stopped", "running", "broken"]
    """stopped: it can be resumed; broken: no checkpoint or no readable recipe."""
    steps: int | None
    """The step of the newest checkpoint."""
    total_steps: int | None
    """The horizon of the schedule."""
    val_bpb: float | None
    """Validation bits per byte of the newest validation."""
    train_loss: float | None
    """The newest training loss, in nats per token."""
    modified: str
    """When its newest checkpoint was written (ISO 8601, local time)."""
    bytes: int
    """Size on disk."""
    description: str = ""
    """The recipe's description."""


class RunsListReport(Report):
    """All runs of a folder, newest first."""

    schema_: Literal["valkyrie.runs.list/1"] = Field(default="valkyrie.runs.list/1", alias="schema")
    runs_dir: str
    """The folder that was read."""
    runs: list[RunSummary]
    """Its runs."""


class RunsShowReport(Report):
    """Everything a run's directory says."""

    schema_: Literal["valkyrie.runs.show/1"] = Field(default="valkyrie.runs.show/1", alias="schema")
    summary: RunSummary
    """The line of `runs list`."""
    checkpoints: list[int]
    """The steps of its checkpoints."""
    files: dict[str, int]
    """Its other files, with their sizes in bytes."""
    recipe: dict[str, Any] | None
    """The resolved recipe."""
    environment: dict[str, Any] | None
    """Versions and machine of the training."""
    report: dict[str, Any] | None
    """report.json, once training ended."""
    validations: list[dict[str, Any]]
    """The validation rows of metrics.jsonl."""
