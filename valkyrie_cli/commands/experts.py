"""`valkyrie experts`: how a run uses its experts, and what each of them is worth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from valkyrie_cli.errors import Failure
from valkyrie_cli.expert_tables import draw_experts
from valkyrie_cli.progress import ReadingDisplay
from valkyrie_cli.render import JsonOption, RunArgument, RunsDirOption, emit, say
from valkyrie_core.errors import GateError, UsageError

if TYPE_CHECKING:
    from valkyrie_core.report import ExpertsReport


def experts(
    run: RunArgument = None,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", help="The checkpoint of this step, not the best one."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="A text to read instead of the run's validation data, as a domain. Repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="N", min=2, help="Tokens of each domain (default 16,384)."
        ),
    ] = None,
    knock_out: Annotated[
        bool,
        typer.Option(
            "--knock-out/--no-knock-out",
            help="Remove experts one at a time, or leave that out: it takes the longest.",
        ),
    ] = True,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Write files into the run, or nothing.")
    ] = True,
    fail_on: Annotated[
        Literal["dead"] | None,
        typer.Option("--fail-on", help="Exit with 9 if an expert is dead, after the report."),
    ] = None,
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Show how a run uses its experts: loads, what they choose, what removing one costs.

    Reads held-out text, every corpus as a domain. Balance says little about worth, so experts are
    also removed, one at a time: the rise of the loss is what one is worth. Writes experts.html,
    experts.json and pictures into the run.

    \b
    Examples:
      valkyrie experts
      valkyrie experts tiny-moe
      valkyrie experts tiny-moe --step 20 --tokens 4096
      valkyrie experts tiny-moe --text PROSE.txt --text CODE.py
      valkyrie experts tiny-moe --no-knock-out --no-save
      valkyrie experts tiny-moe --fail-on dead --json
    """
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")
    with ReadingDisplay() as display:
        found = runs.experts(
            place.path,
            step=step,
            texts=text or [],
            tokens=tokens,
            knock_out=knock_out,
            save=save,
            progress=display.show,
        )
    data = found.model_dump(mode="json")
    failure = _failure(found) if fail_on == "dead" else None
    if failure is not None:
        # one object on stdout: the report, and why it is not fine
        data["error"] = asdict(failure)
    emit(data, as_json=as_json, human=lambda console: draw_experts(found, console))
    if save:
        say(f"kept in {place.path}: experts.html, experts.json, experts*.png", style="dim")
    if failure is not None:
        say(f"error: {failure.message}", style="red")
        say(f"hint: {failure.hint}", style="dim")
        raise typer.Exit(failure.exit_code)


def _failure(report: ExpertsReport) -> Failure | None:
    """Why the gate `dead` does not hold, or can't be told to hold."""
    if not report.num_dead:
        if report.tells_dead:
            return None
        return Failure(
            type="UsageError",
            message="the text is too short to say whether an expert is dead",
            hint="read more: --tokens, or a longer --text",
            exit_code=UsageError.exit_code,
        )
    places = ", ".join(
        f"layer {layer.layer}: {' '.join(str(one.expert) for one in layer.dead or ())}"
        for layer in report.layers
        if layer.dead
    )
    return Failure(
        type="GateError",
        message=f"dead experts: {report.num_dead} ({places})",
        hint="balance and revive in the recipe's ffn keep experts in use",
        exit_code=GateError.exit_code,
    )
