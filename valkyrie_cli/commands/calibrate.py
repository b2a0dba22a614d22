"""`valkyrie calibrate`: from which confidence on thought may end, with a guarantee."""

from __future__ import annotations

from typing import Annotated

import typer

from valkyrie_cli.progress import ReadingDisplay
from valkyrie_cli.render import JsonOption, RunArgument, RunsDirOption, emit, say
from valkyrie_cli.thinking_tables import draw_calibration


def calibrate(
    run: RunArgument = None,
    risk: Annotated[
        float,
        typer.Option(
            "--risk",
            help="How often ending early may make a right answer wrong, of all questions; of text, "
            "the share of tokens that may be others.",
        ),
    ] = 0.02,
    delta: Annotated[
        float, typer.Option("--delta", help="The chance that is taken of more than that.")
    ] = 0.05,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Which half of the held-out questions chooses.")
    ] = 0,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Keep the threshold in the run, or nothing.")
    ] = True,
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Choose from which confidence on thought may end, so that next to nothing is lost.

    Thresholds are tried from the most careful one on, on half of the held-out questions (of text:
    documents), by Learn then Test: the risk is bounded, whatever the model. The other half says
    what it saves and costs. `valkyrie eval` goes by the threshold that is kept. If none holds,
    full depth is kept, and that is no error.

    \b
    Examples:
      valkyrie calibrate
      valkyrie calibrate recursive --risk 0.02
      valkyrie calibrate canvas --risk 0.01 --delta 0.1
      valkyrie calibrate canvas --no-save --json
    """
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")
    with ReadingDisplay() as display:
        report = runs.calibrate(
            place.path, risk=risk, delta=delta, seed=seed, save=save, progress=display.show
        )
    emit(report, as_json=as_json, human=lambda console: draw_calibration(report, console))
    if save:
        say(f"kept in {place.path}: calibration.json", style="dim")
