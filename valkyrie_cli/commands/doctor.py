"""`valkyrie doctor`: what this machine can do, and what is missing for what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from valkyrie_cli.render import JsonOption, RunsDirOption, emit, make_table, safe_line

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import DoctorReport

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(runs_dir: RunsDirOption = "runs", as_json: JsonOption = False) -> None:
    """Look at this machine: versions, threads, bf16, kernels, measured peaks, disk, extras.

    Exits with 4 if something that training needs is missing.

    \b
    Examples:
      valkyrie doctor
      valkyrie doctor --json
    """
    from valkyrie_core import runs

    report = runs.doctor(runs_dir)
    emit(report, as_json=as_json, human=lambda console: _draw(report, console))
    if not report.ok:
        raise typer.Exit(4)


def _draw(report: DoctorReport, console: Console) -> None:
    from rich.text import Text

    table = make_table("status", "check", "value", "hint", border=False)
    for check in report.checks:
        table.add_row(
            Text(check.status, style=STYLES[check.status]),
            check.name,
            safe_line(check.value),
            safe_line(check.hint or ""),
        )
    console.print(table)
