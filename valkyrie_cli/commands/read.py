"""`valkyrie read`: reads a text once and keeps the model's state after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from valkyrie_cli.commands.generate import StateOption, WeightsOption
from valkyrie_cli.progress import ReadingDisplay
from valkyrie_cli.render import (
    JsonOption,
    RunsDirOption,
    emit,
    human_count,
    human_seconds,
    say,
)

if TYPE_CHECKING:
    from rich.console import Console


def read(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or directory.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A UTF-8 text file.")],
    save_state: Annotated[
        Path,
        typer.Option(
            "--save-state", metavar="FILE", help="Where the state goes; replaced if there."
        ),
    ],
    state: StateOption = None,
    chunk: Annotated[
        int, typer.Option("--chunk", help="Tokens that are read at once: speed and memory.")
    ] = 1024,
    weights: WeightsOption = "fp32",
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Read a text and keep the model's state in a file, to go on from it in no time.

    The file is bound to the run's weights and tokenizer. `valkyrie chat` and `valkyrie generate`
    begin with it; with --state a text is read after another. Stopped early, nothing is written.

    \b
    Examples:
      valkyrie read quickstart BOOK.txt --save-state book.state
      valkyrie read quickstart SEQUEL.txt --state book.state --save-state both.state
    """
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")
    with ReadingDisplay() as display:
        report = runs.read(
            place.path,
            text,
            save_state,
            state=state,
            chunk=chunk,
            weights=weights,
            progress=display.show,
        )

    def human(console: Console) -> None:
        console.print(
            f"{report.tokens:,} tokens read in {human_seconds(report.seconds)} "
            f"({report.tokens_per_second:,.0f} tokens/s); the state has read "
            f"{report.total_tokens:,} and takes {human_count(float(report.file_bytes))}B in "
            f"{report.file}",
            markup=False,
            soft_wrap=True,
        )

    emit(report, as_json=as_json, human=human)
    say(f"next: valkyrie chat {place.path} --state {report.file}", style="dim")
