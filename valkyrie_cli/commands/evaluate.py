"""`valkyrie eval`: how well a run predicts text it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from valkyrie_cli.progress import ReadingDisplay
from valkyrie_cli.render import (
    JsonOption,
    RunArgument,
    RunsDirOption,
    emit,
    human_count,
    human_seconds,
    make_table,
    say,
)
from valkyrie_core.report import Weights

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import EvalReport

BASELINES = {
    "uniform": "every byte alike",
    "unigram": "byte frequencies of the training text",
    "xz": "xz -9e on the validation text alone",
    "xz_given_training": "xz -9e that has read the training text",
}


def evaluate(
    run: RunArgument = None,
    weights: Annotated[
        Weights,
        typer.Option(
            "--weights",
            help="Score the model with its matrices in bf16 or int8, beside what was trained.",
        ),
    ] = "fp32",
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Measure bits per byte on the held-out text, beside baselines that need no model.

    Bits per byte is what a compressor would need: lower is better, and it compares across
    tokenizers. Every validation token is scored once, from at least half a context of text before
    it where its document has that much.

    \b
    Examples:
      valkyrie eval
      valkyrie eval quickstart
      valkyrie eval quickstart --json
      valkyrie eval --weights int8
    """
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")
    with ReadingDisplay() as display:
        report = runs.evaluate(place.path, weights=weights, progress=display.show)
    emit(report, as_json=as_json, human=lambda console: _draw(report, console))


def _draw(report: EvalReport, console: Console) -> None:
    console.print(
        f"{report.run}, step {report.step}, {human_count(report.parameters)} parameters, "
        f"{human_seconds(report.seconds)}"
    )
    table = make_table("corpus", "bits per byte", "", right=["bits per byte"])
    for name, score in report.corpora.items():
        size = f"{score.tokens} tokens, {score.bytes} bytes, {score.documents} documents"
        table.add_row(name, f"{score.bpb:.4f}", size, style="bold")
        if score.fp32_bpb is not None and score.weights_cost_bpb is not None:
            cost = f"{report.weights} costs {score.weights_cost_bpb:+.5f}"
            table.add_row("  fp32", f"{score.fp32_bpb:.4f}", f"as trained; {cost}")
        for baseline, value in score.baselines.items():
            number = "-" if value is None else f"{value:.4f}"
            table.add_row(f"  {baseline}", number, BASELINES.get(baseline, ""), style="dim")
    console.print(table)
    for name, score in report.corpora.items():
        for note in score.notes:
            say(f"{name}: {note}", style="dim")
