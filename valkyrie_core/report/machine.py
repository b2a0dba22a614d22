"""What looking over a machine answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class Check(Part):
    """One line of `valkyrie doctor`."""

    status: Literal["ok", "warn", "fail"]
    """warn: it works, with less; fail: something will not work."""
    what: str
    """What was looked at."""
    detail: str
    """What was found."""
    fix: str | None = None
    """What to do about it."""


class DoctorReport(Report):
    """What this machine can do and what is missing for what."""

    schema_: Literal["valkyrie.doctor/1"] = Field(default="valkyrie.doctor/1", alias="schema")
    ok: bool
    """No check failed."""
    environment: dict[str, Any]
    """Versions, device, threads, precision, measured peaks."""
    checks: list[Check]
    """All checks."""
