"""`valkyrie eval`: how well a run predicts text it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from valkyrie_cli.long_tables import draw_long
from valkyrie_cli.progress import ReadingDisplay
from valkyrie_cli.render import (
    JsonOption,
    RunArgument,
    RunsDirOption,
    emit,
    human_count,
    human_seconds,
    make_table,
    safe_line,
    say,
)
from valkyrie_cli.thinking_tables import draw_memory, draw_thinking
from valkyrie_core.report.formats import KVFormat, RecurrentFormat, Weights

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import Accuracy, EvalReport

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
    long_context: Annotated[
        int | None,
        typer.Option(
            "--long-context",
            metavar="N",
            help="Read one text of N tokens instead: losses, speed and memory by length.",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk",
            help="With --long-context: tokens that are read at once (default 1024; 128 where the "
            "state is rounded, which happens after every chunk).",
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="With --long-context: also write long_context.md, with all tables."
        ),
    ] = False,
    recall: Annotated[
        bool,
        typer.Option(
            "--recall/--no-recall", help="With --long-context: ask for facts, or leave that out."
        ),
    ] = True,
    text: Annotated[
        Path | None, typer.Option("--text", help="With --long-context: a file to read.")
    ] = None,
    kv_window: Annotated[
        int | None,
        typer.Option(
            "--kv-window",
            metavar="W",
            help="With --long-context: attention sees W last tokens and its sinks, the first four.",
        ),
    ] = None,
    kv_dtype: Annotated[
        KVFormat,
        typer.Option("--kv-dtype", help="With --long-context: how keys and values are kept."),
    ] = "computed",
    state_dtype: Annotated[
        RecurrentFormat,
        typer.Option("--state-dtype", help="With --long-context: how recurrent states are kept."),
    ] = "computed",
    yarn: Annotated[
        float | None,
        typer.Option(
            "--yarn",
            metavar="FACTOR",
            help="With --long-context: stretch rotary positions, without training.",
        ),
    ] = None,
    halt: Annotated[
        str | None,
        typer.Option(
            "--halt",
            metavar="RULE",
            help="What ends thought early: confidence=0.9, q_halt, kl=0.001, latent=0.03, "
            "argmax=2, calibrated or none (default: calibrated, else the recipe's).",
        ),
    ] = None,
    min_depth: Annotated[
        int | None,
        typer.Option("--min-depth", min=1, help="Loops or steps before anything may end."),
    ] = None,
    max_depth: Annotated[
        int | None,
        typer.Option("--max-depth", min=1, help="Loops or steps at most (default: as trained)."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            metavar="COSINE",
            min=0.0,
            max=1.0,
            help="Of a canvas: ask once more, with a memory of verified answers to questions that "
            "are so near.",
        ),
    ] = None,
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
      valkyrie eval recursive --halt kl=0.001
      valkyrie eval recursive --halt none --max-depth 8
      valkyrie eval canvas --memory 0.95
      valkyrie eval --long-context 16384
      valkyrie eval --long-context 16384 --report
      valkyrie eval --long-context 131072 --no-recall
      valkyrie eval quickstart --long-context 4096 --text BOOK.txt
      valkyrie eval --long-context 16384 --kv-window 512 --kv-dtype int8 --state-dtype bf16
      valkyrie eval --long-context 4096 --yarn 8
    """
    from valkyrie_core import runs
    from valkyrie_core.errors import UsageError

    if long_context is None:
        alone = {
            "--chunk": chunk is not None,
            "--report": report,
            "--no-recall": not recall,
            "--text": text is not None,
            "--kv-window": kv_window is not None,
            "--yarn": yarn is not None,
            "--kv-dtype": kv_dtype != "computed",
            "--state-dtype": state_dtype != "computed",
        }
        if given := [name for name, is_given in alone.items() if is_given]:
            raise UsageError(f"{given[0]} belongs to --long-context N")
    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")
    if long_context is not None:
        if any(one is not None for one in (halt, min_depth, max_depth, memory)):
            raise UsageError(
                "a long text is read at full depth: leave out --halt, --memory and the depths"
            )
        with ReadingDisplay() as display:
            found = runs.evaluate_long_context(
                place.path,
                long_context,
                chunk=chunk,
                text=text,
                weights=weights,
                kv_window=kv_window,
                kv_dtype=kv_dtype,
                state_dtype=state_dtype,
                yarn=yarn,
                recall=recall,
                page=report,
                progress=display.show,
            )
        emit(found, as_json=as_json, human=lambda console: draw_long(found, console))
        page = ", long_context.md" if report else ""
        say(f"kept in {place.path}: long_context.json, long_context.png{page}", style="dim")
        return
    with ReadingDisplay() as display:
        scores = runs.evaluate(
            place.path,
            weights=weights,
            halt=halt,
            min_depth=min_depth,
            max_depth=max_depth,
            memory=memory,
            progress=display.show,
        )
    emit(scores, as_json=as_json, human=lambda console: _draw(scores, console))


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
            table.add_row("  all in fp32", f"{score.fp32_bpb:.4f}", cost)
        for baseline, value in score.baselines.items():
            number = "-" if value is None else f"{value:.4f}"
            table.add_row(f"  {baseline}", number, BASELINES.get(baseline, ""), style="dim")
    console.print(table)
    for name, score in report.corpora.items():
        if score.accuracy is not None:
            _draw_accuracy(name, score.accuracy, console)
        if score.thinking is not None:
            draw_thinking(name, score.thinking, console)
        if score.memory is not None:
            draw_memory(name, score.memory, console)
    for name, score in report.corpora.items():
        for note in score.notes:
            say(f"{name}: {note}", style="dim")


def _draw_accuracy(name: str, accuracy: Accuracy, console: Console) -> None:
    columns = ["", "all", *(f"level {level}" for level in accuracy.by_difficulty)]
    table = make_table(*columns, right=columns[1:])
    shares = (accuracy.share, *accuracy.by_difficulty.values())
    table.add_row(f"{safe_line(name)}: right answers", *(f"{share:.1%}" for share in shares))
    table.add_row("  one answer for all", f"{accuracy.constant_answer:.1%}", style="dim")
    console.print(table)
    console.print(f"Of {accuracy.questions} held-out questions.")
