"""`valkyrie tokenizer`: build a recipe's tokenizer, and see what it does to text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from valkyrie_cli.render import (
    JsonOption,
    SetOption,
    emit,
    human_count,
    human_seconds,
    make_table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from valkyrie_core.report import TokenizerBuildReport, TokenizerEvalReport

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Tokenizers: build one on a recipe's corpora, and measure what it does to text.\n"
    "\n\b\nExamples:\n"
    "  valkyrie tokenizer build quickstart     train it and write it to tokenizers/quickstart\n"
    "  valkyrie tokenizer eval quickstart      bytes per token, exact round trips, its cost",
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of one.")
]


@app.command()
def build(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where to write it; left out, tokenizers/NAME.", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the tokenizer of a recipe on its training documents.

    The same text gives the same tokenizer, bit for bit. `valkyrie train` builds a missing one by
    itself; what is built here serves other recipes too, with
    tokenizer: {type: file, path: tokenizers/NAME/tokenizer.model, vocab_size: N}.

    \b
    Examples:
      valkyrie tokenizer build quickstart
      valkyrie tokenizer build quickstart --set data.tokenizer.vocab_size=2048 --out tokenizers/2k
    """
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    report = runs.build_tokenizer(loaded, out or Path("tokenizers") / loaded.name)
    emit(report, as_json=as_json, human=lambda console: _draw_build(report, console))


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure bytes per token and exact round trips on every document of a recipe.

    Every document is encoded and decoded again, and so are texts that tokenizers get wrong: control
    characters, emoji, text that looks like a special token. A missing tokenizer is built.

    \b
    Examples:
      valkyrie tokenizer eval quickstart
      valkyrie tokenizer eval quickstart --set data.tokenizer.vocab_size=2048
      valkyrie tokenizer eval chat --json
    """
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    report = runs.evaluate_tokenizer(Recipe.load(recipe, overrides or []))
    emit(report, as_json=as_json, human=lambda console: _draw_evaluation(report, console))


def _draw_build(report: TokenizerBuildReport, console: Console) -> None:
    table = make_table("what", "value", border=False)
    table.add_row("tokenizer", f"{report.kind}, {report.vocab_size} tokens")
    table.add_row("directory", report.directory)
    table.add_row("documents", f"{report.documents} to train on")
    table.add_row("fingerprint", report.fingerprint)
    table.add_row("time", human_seconds(report.seconds))
    console.print(table)


def _draw_evaluation(report: TokenizerEvalReport, console: Console) -> None:
    console.print(f"{report.kind}, {report.vocab_size} tokens, {report.fingerprint[:16]}")
    numbers = ["documents", "bytes", "tokens", "bytes per token", "train", "validation", "exact"]
    table = make_table("corpus", *numbers, right=numbers)
    for name, score in report.corpora.items():
        table.add_row(
            name,
            str(score.documents),
            str(score.bytes),
            str(score.tokens),
            _ratio(score.bytes_per_token),
            _ratio(score.train_bytes_per_token),
            _ratio(score.validation_bytes_per_token),
            f"{score.round_trips}/{score.documents}",
        )
    console.print(table)
    changed = [name for name, exact in report.hostile.items() if not exact]
    exact = len(report.hostile) - len(changed)
    console.print(f"hostile texts that come back exactly: {exact}/{len(report.hostile)}")
    if changed:
        console.print(f"changed: {', '.join(changed)}", style="red")
    share = report.parameters_share
    console.print(
        f"embedding and head: {human_count(report.embedding_parameters)} parameters"
        + (f", {share:.1%} of the model" if share is not None else "")
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
