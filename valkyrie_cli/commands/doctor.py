"""`valkyrie doctor`: what this machine can do, and what is missing for what."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from valkyrie_cli.errors import Failure
from valkyrie_cli.render import JsonOption, RunsDirOption, emit, make_table, safe_line, say
from valkyrie_core.errors import MissingError

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

    report = runs.doctor(runs_dir, progress=lambda what: say(f"looking at {what}", style="dim"))
    data = report.model_dump(mode="json")
    failed = [check for check in report.checks if check.status == "fail"]
    if failed:
        data["error"] = asdict(
            Failure(
                type="MissingError",
                message="; ".join(f"{check.what}: {check.detail}" for check in failed),
                hint=failed[0].fix,
                exit_code=MissingError.exit_code,
            )
        )
    emit(data, as_json=as_json, human=lambda console: _draw(report, console))
    if failed:
        raise typer.Exit(MissingError.exit_code)


def _draw(report: DoctorReport, console: Console) -> None:
    from rich.text import Text

    table = make_table("status", "what", "detail", border=False)
    for check in report.checks:
        detail = check.detail if check.fix is None else f"{check.detail} -> {check.fix}"
        status = Text(check.status, style=STYLES[check.status])
        table.add_row(status, safe_line(check.what), safe_line(detail))
    console.print(table)
