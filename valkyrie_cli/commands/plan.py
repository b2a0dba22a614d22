"""`valkyrie plan`: what a recipe costs, before anything is built."""

from __future__ import annotations

from typing import Annotated

import typer

from valkyrie_cli.plan_tables import draw_plan
from valkyrie_cli.render import JsonOption, SetOption, emit, say


def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of one.")
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Propose what fits into so much: 24GiB, 24GB, 512MiB or bytes. "
            "Left out: what this machine has free.",
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what a recipe costs: parameters, FLOPs by type of mixer, memory, time, disk.

    No weights are built and no text is read. Parameters and files are exact, FLOPs a formula;
    memory is traced on tensors without data; seconds are estimates. The first time on a machine
    its speed and the memory of a training process are measured, which takes some ten seconds.

    \b
    Examples:
      valkyrie plan quickstart
      valkyrie plan quickstart --memory 512MiB
      valkyrie plan recipes/tiny/hybrid.yaml --set model.dim=64
      valkyrie plan quickstart --set train.context_len=4096 --json
    """
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    report = runs.plan(
        Recipe.load(recipe, overrides or []),
        memory=memory,
        progress=lambda what: say(f"looking at {what}", style="dim"),
    )
    emit(report, as_json=as_json, human=lambda console: draw_plan(report, console))
