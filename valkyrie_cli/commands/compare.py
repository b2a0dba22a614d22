"""`valkyrie compare`: a verdict on designs, with its evidence."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from valkyrie_cli.comparison_tables import draw_comparison
from valkyrie_cli.progress import ReadingDisplay, TrainingDisplay
from valkyrie_cli.render import JsonOption, RunsDirOption, emit, human_seconds, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from valkyrie_core.runs import StepEvent

EXPERIMENTS = {"quick": (1, 0.25), "standard": (3, 1.0), "extended": (5, 2.0)}
"""Seeds, and the share of the recipe's steps."""
LOG_EVERY = 50


def compare(
    designs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...",
            help="Recipes or runs. `run:NAME` and `recipe:NAME` say which, where a name is both.",
        ),
    ],
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=100, help="Trainings of each (default 3).")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Of A's trainings; left out, what its recipe says."),
    ] = None,
    match: Annotated[
        Literal["tokens", "params", "flops", "seconds"],
        typer.Option("--match", help="What trainings have in common."),
    ] = "tokens",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V1,V2",
            help="Compare values of a key of one recipe; several of them make a grid.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Of all trainings, as 20m or 1h30m: designs that don't fit are dropped by short "
            "trainings first (successive halving).",
        ),
    ] = None,
    experiment: Annotated[
        Literal["quick", "standard", "extended"],
        typer.Option(
            "--experiment",
            help="quick: one seed, a quarter of the steps. extended: five seeds, twice the steps.",
        ),
    ] = "standard",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the comparison lies."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Only go on with a comparison that was begun; without, both are done."
        ),
    ] = False,
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Compare designs: trained alike, scored on the same items, with honest statistics.

    A's text, order, batches and evaluation serve all. Differences are paired by seed and item,
    intervals are over other seeds and other items, p is corrected for all metrics. "No difference
    was found" is a result, and says how large one would have been found. Writes
    comparison_summary.json, comparison_plots.png and comparison.md into results/A_vs_B. The same
    command goes on where it was stopped; finished runs of the same design and seed are used again.

    \b
    Examples:
      valkyrie compare baseline quickstart
      valkyrie compare moe mine.yaml --match flops --seeds 5
      valkyrie compare tiny/hybrid tiny/rwkv7 --steps 20 --json
      valkyrie compare run:quickstart recipes/mine.yaml --experiment quick
      valkyrie compare tiny/hybrid --vary train.optimizer.lr=0.01,0.02 --vary model.dim=32,64
      valkyrie compare quickstart --vary train.optimizer.lr=0.005,0.01,0.02,0.04 --budget 40m
    """
    from valkyrie_core import runs

    many, share = EXPERIMENTS[experiment]
    command = _command(designs, seeds, steps, match, experiment, out, runs_dir, vary or [], budget)
    with _Display() as display:
        report = runs.compare(
            designs,
            seeds=seeds or many,
            steps=steps,
            share=share,
            match=match,
            runs_dir=runs_dir,
            out=out,
            resume=resume,
            vary=vary or [],
            budget=budget,
            begin=display.begin,
            reading=display.reading,
            resume_command=command,
        )
    emit(report, as_json=as_json, human=lambda console: draw_comparison(report, console))
    say(f"kept in {report.directory}: comparison.md, comparison_plots.png", style="dim")


class _Display:
    """One bar after the other: of trainings, then of what is scored."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._reading: ReadingDisplay | None = None

    def __enter__(self) -> _Display:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def begin(
        self, name: str, number: int, count: int, eta_seconds: float
    ) -> Callable[[StepEvent], None]:
        """A training begins."""
        self._stack.close()
        self._reading = None
        say(f"training {number} of {count}: {name}; all of them take {human_seconds(eta_seconds)}")
        return self._stack.enter_context(TrainingDisplay(name, LOG_EVERY)).show

    def reading(self, corpus: str, read: int, total: int) -> None:
        """A model reads what it is scored on."""
        if self._reading is None:
            self._stack.close()
            self._reading = self._stack.enter_context(ReadingDisplay())
        self._reading.show(corpus, read, total)


def _command(
    designs: list[str],
    seeds: int | None,
    steps: int | None,
    match: str,
    experiment: str,
    out: Path | None,
    runs_dir: str,
    vary: list[str],
    budget: str | None,
) -> str:
    """What does the same again."""
    parts = ["valkyrie", "compare", *designs]
    parts += [] if seeds is None else ["--seeds", str(seeds)]
    parts += [] if steps is None else ["--steps", str(steps)]
    parts += [] if match == "tokens" else ["--match", match]
    parts += [] if experiment == "standard" else ["--experiment", experiment]
    parts += [] if out is None else ["--out", str(out)]
    parts += [] if runs_dir == "runs" else ["--runs-dir", runs_dir]
    for one in vary:
        parts += ["--vary", one]
    parts += [] if budget is None else ["--budget", budget]
    return shlex.join(parts)
