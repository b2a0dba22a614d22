"""`valkyrie train`: a recipe becomes a trained run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from valkyrie_cli.progress import TrainingDisplay
from valkyrie_cli.render import (
    JsonOption,
    SetOption,
    emit,
    human_count,
    human_seconds,
    make_table,
    safe_line,
    say,
)

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import TrainReport


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of one.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="All steps of a fresh run (the schedule's horizon); "
            "with --resume, the step to stop at.",
        ),
    ] = None,
    extend_steps: Annotated[
        int | None,
        typer.Option("--extend-steps", min=1, help="Train a finished run for so many steps more."),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model from a recipe.

    The run lives in RUNS_DIR/NAME, after the recipe's keys runs_dir and name. Ctrl-C (or SIGTERM)
    saves and says how to go on; a second one ends at once. A run that was resumed gives the same
    weights, bit for bit, as one that was not stopped.

    \b
    Examples:
      valkyrie train quickstart
      valkyrie train quickstart --resume
      valkyrie train recipes/tiny/hybrid.yaml --set name=wide --set model.dim=64
      valkyrie train quickstart --extend-steps 200 --json
    """
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    values = overrides or []
    loaded = Recipe.load(recipe, values)
    parts = ["valkyrie", "train", recipe, "--resume"]
    for value in values:
        parts += ["--set", value]
    command = shlex.join(parts)
    with TrainingDisplay(loaded.name, loaded.train.log_every) as display:
        report = runs.train(
            loaded,
            resume=resume,
            steps=steps,
            extend_steps=extend_steps,
            progress=display.show,
            resume_command=command,
        )
    emit(report, as_json=as_json, human=lambda console: draw_report(report, console))
    if report.finished:
        say(f"next: valkyrie eval {safe_line(report.directory)}", style="dim")
    else:
        say(f"go on with: {command}", style="dim")


def draw_report(report: TrainReport, console: Console) -> None:
    """The result of a training as a table."""
    table = make_table("key", "value", border=False)
    speed = "-"
    if report.tokens_per_second is not None:
        speed = f"{report.tokens_per_second:,.0f} tokens/s"
        if report.mfu is not None:
            speed += f", {100 * report.mfu:.1f} % of the measured matmul peak"
    best = ""
    if report.best_val_bpb is not None and report.best_step != report.steps:
        best = f" (best {report.best_val_bpb:.4f} at step {report.best_step})"
    rows = {
        "run": f"{report.run} ({report.directory})",
        "steps": f"{report.steps} of {report.total_steps}",
        "tokens": f"{human_count(float(report.tokens_seen))} in {human_seconds(report.seconds)}",
        "speed": speed,
        "train loss": "-" if report.train_loss is None else f"{report.train_loss:.4f} nats/token",
        "validation": "-" if report.val_bpb is None else f"{report.val_bpb:.4f} bits/byte{best}",
    }
    if len(report.val_bpb_by_corpus) > 1:
        for name, bpb in report.val_bpb_by_corpus.items():
            rows[f"  {name}"] = f"{bpb:.4f} bits/byte"
    for key, value in rows.items():
        table.add_row(key, safe_line(value))
    console.print(table)
