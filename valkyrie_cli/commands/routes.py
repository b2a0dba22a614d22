"""`valkyrie routes`: which mixers the tokens of a text go through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from valkyrie_cli.render import (
    JsonOption,
    RunArgument,
    RunsDirOption,
    emit,
    make_table,
    safe_line,
    say,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from valkyrie_core.report.routes import PassRoutes, RoutesReport

_STYLES = ("blue", "yellow", "green", "red", "magenta", "cyan")
"""Of the mixers, in a router's order."""


def routes(
    run: RunArgument = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="A text to read, instead of held-out text."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The text itself.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", min=1, help="Tokens of it (default 256)."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", help="The checkpoint of this step, not the best one."),
    ] = None,
    halt: Annotated[
        str | None,
        typer.Option(
            "--halt",
            metavar="RULE",
            help="Where a confidence drives routers: confidence=0.9, or calibrated.",
        ),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Draw routes.png into the run, or nothing.")
    ] = True,
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Show which mixers the tokens of a text go through in a run with routers.

    Every layer whose mixer is routed is shown with the text in the colours of its mixers, and
    with the share of tokens that each of them was used for. Draws routes.png into the run.

    \b
    Examples:
      valkyrie routes
      valkyrie routes tiny-routed --tokens 100
      valkyrie routes tiny-routed --text STORY.txt
      valkyrie routes tiny-routed --prompt "def f(x):" --no-save --json
      valkyrie routes tiny-sure --halt calibrated
    """
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")
    found = runs.routes(
        place.path, step=step, text=text, prompt=prompt, tokens=tokens, halt=halt, save=save
    )
    emit(found, as_json=as_json, human=lambda console: _draw(found, console))
    if save:
        say(f"kept in {place.path}: routes.png", style="dim")


def _draw(report: RoutesReport, console: Console) -> None:
    from rich.text import Text

    console.print(
        f"{safe_line(report.run)}, step {report.step}, {len(report.tokens)} tokens of "
        f"{safe_line(report.text)}",
        soft_wrap=True,
    )
    for one in report.routers:
        console.print()
        console.print(_heading(one), soft_wrap=True)
        line = Text()
        for token, mixer in zip(report.tokens, one.likeliest, strict=True):
            line.append(safe_line(token), style=_STYLES[mixer % len(_STYLES)])
        console.print(line, soft_wrap=True)
    console.print()
    table = make_table("router", "mixer", "tokens", "operations", right=["tokens", "operations"])
    for one in report.routers:
        for number, name in enumerate(one.mixers):
            first = number == 0
            table.add_row(
                safe_line(one.place) if first else "",
                safe_line(name),
                f"{one.share[name]:.1%}",
                f"{one.operations:.0%}" if first else "",
            )
    console.print(table)
    if all(one.hard for one in report.routers):
        console.print("Operations: of those of the costliest mixer for all tokens.")
    else:
        console.print(
            "Operations: of those of the costliest mixer for all tokens, by the gates; where "
            "choices are soft, all mixers run for all tokens."
        )


def _heading(one: PassRoutes) -> Text:
    from rich.text import Text

    line = Text(f"{safe_line(one.place)}, {'hard' if one.hard else 'soft'}: ")
    for number, name in enumerate(one.mixers):
        line.append(", " if number else "")
        line.append(safe_line(name), style=_STYLES[number % len(_STYLES)])
    return line
