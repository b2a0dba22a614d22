"""`valkyrie generate`: one continuation of one prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from valkyrie_cli.prompts import one_prompt
from valkyrie_cli.render import (
    JsonOption,
    RunArgument,
    RunsDirOption,
    emit,
    human_seconds,
    safe_text,
    say,
)
from valkyrie_core.report.formats import Weights

if TYPE_CHECKING:
    from rich.console import Console

MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="The longest answer, in tokens.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        max=10.0,
        help="Higher is more varied; 0 takes the likeliest token (default 0.8).",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        help="Draw from the likeliest tokens that hold this much probability (default 0.95), "
        "more than 0.",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", min=1, help="Draw from this many likeliest tokens (default: all)."),
]
PenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        min=0.1,
        max=10.0,
        help="Above 1, tokens that were just used become less likely (default 1).",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Same seed and prompt, same answer (default 0)."),
]

WeightsOption = Annotated[
    Weights,
    typer.Option(
        "--weights",
        help="The model's matrices: fp32 as trained; bf16 and int8 are faster, and `valkyrie eval "
        "--weights` measures what they cost.",
    ),
]

HaltOption = Annotated[
    str | None,
    typer.Option(
        "--halt",
        metavar="RULE",
        help="Of a looped model: what ends the thought about a token, such as confidence=0.9, "
        "kl=0.001 or calibrated; see `valkyrie eval` (default: nothing).",
    ),
]

StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="FILE",
        help="Begin with what a state file has read (`valkyrie read`, /save-state).",
    ),
]


def generate(
    run: RunArgument = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to continue; - reads stdin.")
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    state: StateOption = None,
    weights: WeightsOption = "fp32",
    halt: HaltOption = None,
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Continue a text with a trained model.

    The answer goes to stdout as it is written; what comes from the model is shown, never sent to
    the terminal as a command.

    \b
    Examples:
      valkyrie generate --prompt "Enter MACBETH."
      valkyrie generate quickstart --prompt "First Witch" --temperature 0 --max-tokens 40
      echo "To be, or not" | valkyrie generate --json
      valkyrie generate --prompt "To be" --weights int8
      valkyrie generate recursive --prompt "ab bc ca: a2=" --halt calibrated
      valkyrie generate --state book.state --prompt "In the end"
    """
    text = one_prompt(prompt)
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")

    def write(chunk: str) -> None:
        sys.stdout.write(safe_text(chunk))
        sys.stdout.flush()

    report = runs.generate(
        place.path,
        prompt=text,
        max_tokens=max_tokens,
        sampling=runs.sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        state=state,
        on_text=None if as_json else write,
        weights=weights,
        halt=halt,
    )

    def human(console: Console) -> None:
        console.file.write("\n")

    emit(report, as_json=as_json, human=human)
    speed = f"{report.tokens_per_second:.0f} tokens/s" if report.tokens_per_second else ""
    say(f"{report.tokens} tokens in {human_seconds(report.seconds)}  {speed}".rstrip(), style="dim")
