"""`valkyrie runs`: what has been trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from valkyrie_cli.render import (
    JsonOption,
    RunArgument,
    RunsDirOption,
    emit,
    human_count,
    make_table,
    safe_line,
    say,
)

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import RunsListReport, RunsShowReport, RunSummary

app = typer.Typer(
    rich_markup_mode=None,
    help="List runs and look into one.\n"
    "\n\b\nExamples:\n"
    "  valkyrie runs list               all runs of this folder, newest first\n"
    "  valkyrie runs show quickstart    its state, checkpoints and validations",
)


@app.command("list")
def list_runs(runs_dir: RunsDirOption = "runs", as_json: JsonOption = False) -> None:
    """List all runs of a folder, newest first.

    \b
    Examples:
      valkyrie runs list
      valkyrie runs list --runs-dir experiments --json
    """
    from valkyrie_core import runs

    report = runs.list_runs(runs_dir)
    emit(report, as_json=as_json, human=lambda console: _draw_list(report, console))


@app.command("show")
def show(
    run: RunArgument = None, runs_dir: RunsDirOption = "runs", as_json: JsonOption = False
) -> None:
    """Show one run: its state, checkpoints, validations and files.

    \b
    Examples:
      valkyrie runs show
      valkyrie runs show quickstart --json
    """
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir, usable=False)
    if run is None:
        say(f"run {place.name} ({place.path})")
    report = runs.show_run(place.path)
    emit(report, as_json=as_json, human=lambda console: _draw_show(report, console))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _steps(summary: RunSummary) -> str:
    done = "-" if summary.steps is None else str(summary.steps)
    return done if summary.total_steps is None else f"{done}/{summary.total_steps}"


def _draw_list(report: RunsListReport, console: Console) -> None:
    if not report.runs:
        console.print(f"no runs in {safe_line(report.runs_dir)}")
        say("hint: valkyrie train quickstart")
        return
    table = make_table(
        "run", "state", "steps", "val bpb", "train loss", "size", "modified",
        right=["steps", "val bpb", "train loss", "size"],
    )  # fmt: skip
    for summary in report.runs:
        table.add_row(
            safe_line(summary.run),
            summary.state,
            _steps(summary),
            _number(summary.val_bpb, 4),
            _number(summary.train_loss, 3),
            f"{human_count(float(summary.bytes))}B",
            summary.modified.replace("T", " "),
        )
    console.print(table)


def _draw_show(report: RunsShowReport, console: Console) -> None:
    summary = report.summary
    table = make_table("key", "value", border=False)
    rows = {
        "run": summary.run,
        "directory": summary.directory,
        "description": summary.description,
        "state": summary.state,
        "steps": _steps(summary),
        "val bpb": _number(summary.val_bpb, 4),
        "train loss": _number(summary.train_loss, 3),
        "size": f"{human_count(float(summary.bytes))}B",
        "modified": summary.modified.replace("T", " "),
        "checkpoints": ", ".join(f"step {step}" for step in report.checkpoints) or "none",
        "files": ", ".join(report.files),
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, safe_line(value))
    console.print(table)
    if report.validations:
        history = make_table("step", "val bpb", right=["step", "val bpb"])
        for row in report.validations:
            history.add_row(str(row.get("step", "-")), _number(row.get("bpb"), 4))
        console.print(history)
