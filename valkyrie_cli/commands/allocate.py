"""`valkyrie allocate`: which layers are recurrent and which attention, and which should be."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from valkyrie_cli.allocation_tables import draw_importance, draw_report, draw_search
from valkyrie_cli.progress import ReadingDisplay
from valkyrie_cli.render import JsonOption, SetOption, emit, human_seconds, say

if TYPE_CHECKING:
    from valkyrie_core.runs import Score

WINDOW = 64
"""Tokens that windowed attention sees, if nobody says."""


def allocate(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe's file, or the name of one; with --importance, a run."
        ),
    ],
    ratio: Annotated[
        str | None,
        typer.Option("--ratio", metavar="R:A", help="Recurrent layers to attention layers: 3:1."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            help='Letters R (recurrent), A (attention), or names of blocks; "R R R A x8" lays it '
            "eight times.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="alternate (even layers recurrent, odd ones attention), 3:1, 5:1, 7:1."
        ),
    ] = None,
    match: Annotated[
        Literal["params", "flops"] | None,
        typer.Option(
            "--match",
            help="Keep the recipe's parameters, or its training FLOPs per token: all ffns are "
            "resized by one factor.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the design as a new recipe; with --search, the best one (default "
            "recipes/NAME-allocated.yaml). Never overwrites.",
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="Train small models in many layouts, and choose one."),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="With --search: steps of the longest text proxies."),
    ] = None,
    recall_steps: Annotated[
        int | None,
        typer.Option(
            "--recall-steps", min=1, help="With --search: steps of the longest recall proxies."
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", min=16, help="With --search: channels of the text proxies."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="With --search: seeds of the last rung (default 3)."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            help="With --search: trainings at a time, one thread each (default 2).",
        ),
    ] = None,
    importance: Annotated[
        bool,
        typer.Option(
            "--importance", help="Which layers of a trained run could become recurrent, by KL."
        ),
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            metavar="W",
            min=1,
            help=f"With --importance: tokens that windowed attention sees (default {WINDOW}).",
        ),
    ] = None,
    runs_dir: Annotated[
        str | None,
        typer.Option("--runs-dir", help="With --importance: the folder that holds the runs."),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a recipe's layers, rearrange them, or search for the best order.

    The stack alone needs no training. --search scores layouts on validation loss and on
    associative recall, which tells them apart where the loss does not; Ctrl-C keeps what is done,
    and the same command goes on.

    \b
    Examples:
      valkyrie allocate quickstart
      valkyrie allocate quickstart --ratio 1:1 --match params
      valkyrie allocate quickstart --pattern "R A A R" --match flops --out recipes/raar.yaml
      valkyrie allocate quickstart --preset alternate
      valkyrie allocate quickstart --search
      valkyrie allocate quickstart --search --steps 100 --seeds 2 --out recipes/best.yaml
      valkyrie allocate runs/quickstart --importance --window 64
    """
    from valkyrie_core.errors import UsageError

    searching = {
        "--steps": steps,
        "--recall-steps": recall_steps,
        "--width": width,
        "--seeds": seeds,
        "--processes": processes,
    }
    designing = {"--ratio": ratio, "--pattern": pattern, "--preset": preset, "--match": match}
    if search and importance:
        raise UsageError("--search and --importance are two commands: leave one out")
    if not importance:
        _refuse({"--window": window}, "belongs to --importance")
        _refuse(
            {"--runs-dir": runs_dir},
            "belongs to --importance",
            hint="a search follows --set runs_dir=FOLDER",
        )
    if not search:
        _refuse(searching, "belongs to --search")
    if search or importance:
        _refuse(designing, f"does not go with {'--search' if search else '--importance'}")
    if importance:
        _refuse({"--out": out, "--set": overrides or None}, "does not go with --importance")
        _show_importance(recipe, runs_dir, window, as_json=as_json)
    elif search:
        _search(recipe, searching, out, overrides or [], as_json=as_json)
    else:
        _show_or_design(recipe, designing, out, overrides or [], as_json=as_json)


def _show_importance(run: str, runs_dir: str | None, window: int | None, *, as_json: bool) -> None:
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir or "runs")
    with ReadingDisplay() as display:
        found = runs.allocate_importance(
            place.path, window=WINDOW if window is None else window, progress=display.show
        )
    emit(found, as_json=as_json, human=lambda console: draw_importance(found, console))


def _search(
    recipe: str,
    sizes: dict[str, int | None],
    out: str | None,
    overrides: list[str],
    *,
    as_json: bool,
) -> None:
    from valkyrie_core import runs
    from valkyrie_core.recipe import resolve

    config = runs.search_config(
        steps=sizes["--steps"],
        recall_steps=sizes["--recall-steps"],
        width=sizes["--width"],
        seeds=sizes["--seeds"],
    )
    found = runs.allocate_search(
        resolve(recipe, overrides),
        config,
        out=out,
        processes=sizes["--processes"] or 2,
        told=_tell,
        resume_command=_command(recipe, sizes, out, overrides),
    )
    emit(found, as_json=as_json, human=lambda console: draw_search(found, console))
    say(f"kept in {found.folder}: search.json, search.md, search.png", style="dim")
    if found.out is not None:
        say(f"next: valkyrie train {shlex.quote(found.out)}", style="dim")


def _show_or_design(
    recipe: str, design: dict[str, Any], out: str | None, overrides: list[str], *, as_json: bool
) -> None:
    from valkyrie_core import runs
    from valkyrie_core.recipe import resolve

    report = runs.allocate(
        resolve(recipe, overrides),
        ratio=design["--ratio"],
        pattern=design["--pattern"],
        preset=design["--preset"],
        match=design["--match"],
        out=out,
    )
    emit(report, as_json=as_json, human=lambda console: draw_report(report, console))


def _refuse(options: Mapping[str, object], why: str, *, hint: str | None = None) -> None:
    from valkyrie_core.errors import UsageError

    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} {why}", hint=hint)


def _command(
    recipe: str, options: dict[str, int | None], out: str | None, overrides: list[str]
) -> str:
    """What goes on with this search."""
    parts = ["valkyrie", "allocate", recipe, "--search"]
    for name, value in options.items():
        parts += [name, str(value)] if value is not None else []
    parts += ["--out", out] if out is not None else []
    for override in overrides:
        parts += ["--set", override]
    return shlex.join(parts)


def _tell(score: Score, done: int, eta_seconds: float | None) -> None:
    """A line for every training: they take a minute each."""
    job = score.job
    if job.task == "language":
        number = "diverged" if score.bpb is None else f"{score.bpb:.4f} bits/byte"
    else:
        number = f"recall {sum(score.recall.values()) / len(score.recall):.3f}"
    say(
        f"{done:3d}  rung {job.rung}  {job.candidate}  {job.task}  seed {job.seed}  {number}  "
        f"{human_seconds(score.seconds)}  ETA about {human_seconds(eta_seconds)}"
    )
