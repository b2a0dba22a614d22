"""Sudoku on a canvas: what each part of recursive reasoning is worth, and what halting saves.

    python -m benchmarks.sudoku               # trains what is missing, writes the tables
    python -m benchmarks.sudoku --tables      # only writes docs/reasoning.md anew

The recipe `canvas`, whole and with one part changed, three seeds each. Every trained model is asked
the held-out sudokus at every depth; the whole one by every rule of halting, with its seconds beside
those of full depth, and calibrated. A queue that outlives an interruption by whole trainings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.jobs import Found, Study, run_study, where
from valkyrie_core import Recipe, runs
from valkyrie_core.allocate.statistics import mean_of
from valkyrie_core.data.dataset import prepare
from valkyrie_core.evaluate.rules import rule_of
from valkyrie_core.runs.thinking import halting_of

RISK = 0.02


class Arm(NamedTuple):
    """What is changed."""

    title: str
    overrides: tuple[str, ...]
    rules: tuple[str, ...] = ()
    """Of halting, that it is asked by."""


RULES = ("q_halt", "confidence=0.9", "kl=0.001", "latent=0.03", "argmax=2")
ARMS = {
    "canvas": Arm("as it is", (), RULES),
    "one_step": Arm("gradient through the last turn of f", ("model.core.gradient_cycles=0",)),
    "alone": Arm("no deep supervision: one step", ("model.core.halt_max_steps=1",)),
    "no_ema": Arm("no average of the weights", ("train.ema=null",)),
    "bias_0": Arm("halting bias 0", ("model.core.halting.bias=0",), ("q_halt",)),
}
TRAP = ("canvas", "bias_0")
"""Arms that differ in what ends thought in training."""


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, then writes the page."""
    return run_study(STUDY, arguments)


def _train(arm: str, recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.runs_dir, recipe.name)
    report = runs.train(recipe, resume=(folder / "recipe.json").exists())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    steps = {
        row["step"]: row["recursion"]["reasoning_steps"] for row in rows if row["kind"] == "train"
    }
    return {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "reasoning_steps": steps,
        **asked(folder, ARMS[arm].rules, calibrated=arm == "canvas"),
    }


def asked(folder: Path, rules: Sequence[str], *, calibrated: bool) -> dict[str, Any]:
    """What a trained run says by depth, by rule, and with a calibrated threshold."""
    full = runs.evaluate(folder, halt="none").corpora["sudoku"]
    assert full.accuracy is not None
    found: dict[str, Any] = {
        "share": full.accuracy.share,
        "by_difficulty": full.accuracy.by_difficulty,
        "bpb": full.bpb,
        "thinking": None if full.thinking is None else full.thinking.model_dump(mode="json"),
        "rules": {},
        "calibrated": None,
    }
    if full.thinking is None or not rules:
        return found
    model, tokenizer, recipe = runs.load(folder)
    split = prepare(recipe.data, tokenizer=tokenizer).corpora["sudoku"].validation
    for rule in rules:
        halting = halting_of(
            model,
            split,
            rule_of(rule),
            depth=full.thinking.full_depth,
            score=None,
            full_score=full.accuracy.share,
            context_len=recipe.train.context_len,
        )
        found["rules"][rule] = halting.model_dump(mode="json")
    if calibrated:
        found["calibrated"] = runs.calibrate(folder, risk=RISK).model_dump(mode="json")
    return found


def _tables(found: Sequence[Found]) -> dict[str, str]:
    return {
        "sudoku": parts_table(found),
        "halting": halting_table(found),
        "trap": trap_table(found),
    }


def parts_table(found: Sequence[Found]) -> str:
    """Right answers of every arm."""
    levels = list(found[0]["by_difficulty"])
    heads = ["", *(f"{level} blanks" for level in levels)]
    lines = [
        "| arm | right answers" + " | ".join(heads) + " | steps in training | seeds |",
        "|---" + "|---:" * (len(levels) + 3) + "|",
    ]
    for arm, own in ARMS.items():
        results = [one for one in found if one["arm"] == arm]
        if not results:
            continue
        shares = [mean_of([one["by_difficulty"][level] for one in results]) for level in levels]
        thought = mean_of([_last(one["reasoning_steps"]) for one in results]).value
        lines.append(
            f"| {own.title} | {_percent([one['share'] for one in results])} | "
            + " | ".join(f"{share.value:.1%}" for share in shares)
            + f" | {thought:.1f} | {len(results)} |"
        )
    partial = (
        "" if len(found) == len(ARMS) * len(STUDY.seeds) else " **Partial: more seeds to come.**"
    )
    lines += [
        "",
        f"Means over seeds, Student's 95 % intervals; one thread, {where(found)}.{partial}",
    ]
    return "\n".join(lines)


def _last(steps: Mapping[str, float | None]) -> float:
    """Steps of the questions that ended in the last logged stretch."""
    known = [value for value in steps.values() if value is not None]
    return known[-1]


def _percent(shares: Sequence[float]) -> str:
    mean = mean_of(list(shares))
    width = "" if mean.half_width is None else f" ± {mean.half_width:.1%}"
    return f"{mean.value:.1%}{width}"


def halting_table(found: Sequence[Found]) -> str:
    """What every rule saves and costs, of the whole recipe's models."""
    results = [one for one in found if one["arm"] == "canvas" and one["rules"]]
    lines = [
        "| rule | right answers | points lost | steps | fewer steps | fewer seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    if not results:
        return "\n".join([*lines, "", "**Partial: nothing is there yet.**"])
    full = results[0]["thinking"]["full_depth"]
    shares = [one["share"] for one in results]
    lines.append(f"| all {full} steps | {_percent(shares)} | | {full} | | |")
    for rule in RULES:
        own = [one["rules"][rule] for one in results]
        lines.append(_row(rule, own, full))
    own = [_calibrated(one["calibrated"], full) for one in results]
    lines.append(_row(f"calibrated, risk {RISK:.0%}", own, full))
    said = [one["thinking"] for one in results]
    risks = ", ".join(f"{one['calibrated']['test']['risk']:.2%}" for one in results)
    lines += [
        "",
        f"Calibration of the confidence, over all steps: expected calibration error "
        f"{mean_of([one['calibration_error'] for one in said]).value:.3f}, Brier score "
        f"{mean_of([one['brier'] for one in said]).value:.3f}. Risk measured on the sudokus that "
        f"did not choose the threshold, by seed: {risks}.{_partial(results)}",
    ]
    return "\n".join(lines)


def _partial(results: Sequence[Found]) -> str:
    """Says that seeds of an arm are missing."""
    return "" if len(results) == len(STUDY.seeds) else " **Partial: more seeds to come.**"


def trap_table(found: Sequence[Found]) -> str:
    """What became of thought in training, by the bias that the q-head begins with."""
    lines = [
        "| arm | steps after a tenth of training | at its end | right at full depth "
        "| by `q_halt` | in steps | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in TRAP:
        results = [one for one in found if one["arm"] == arm]
        if not results:
            continue
        by_rule = [one["rules"]["q_halt"] for one in results]
        cells = [
            ARMS[arm].title,
            f"{mean_of([_early(one['reasoning_steps']) for one in results]).value:.1f}",
            f"{mean_of([_last(one['reasoning_steps']) for one in results]).value:.1f}",
            _percent([one["share"] for one in results]),
            _percent([one["score"] for one in by_rule]),
            f"{mean_of([one['reasoning_steps'] for one in by_rule]).value:.2f}",
            str(len(results)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    told = [one for one in found if one["arm"] in TRAP]
    if len(told) < len(TRAP) * len(STUDY.seeds):
        lines += ["", "**Partial: more to come.**"]
    return "\n".join(lines)


def _early(steps: Mapping[str, float | None]) -> float:
    """Steps of the questions that first ended after a tenth of training."""
    tenth = max(map(int, steps)) / 10
    known = [value for step, value in steps.items() if value is not None and int(step) >= tenth]
    return known[0]


def _calibrated(report: Mapping[str, Any], full: int) -> dict[str, float]:
    """As a rule is told, on the rows that did not choose."""
    test = report["test"]
    return {
        "score": test["score"],
        "full_score": test["full_score"],
        "reasoning_steps": test["reasoning_steps"],
        "seconds": test["seconds"],
        "full_seconds": test["full_seconds"],
    }


def _row(title: str, own: Sequence[Mapping[str, float]], full: int) -> str:
    lost = mean_of([one["full_score"] - one["score"] for one in own]).value
    steps = mean_of([one["reasoning_steps"] for one in own]).value
    seconds = mean_of([one["seconds"] / one["full_seconds"] for one in own]).value
    return (
        f"| `{title}` | {_percent([one['score'] for one in own])} | {100 * lost:.1f} | {steps:.2f} "
        f"| {1 - steps / full:.0%} | {1 - seconds:.0%} |"
    )


STUDY = Study(
    name="sudoku",
    about=__doc__.splitlines()[0],
    recipe="canvas",
    arms=ARMS,
    overrides=lambda arm: ARMS[arm].overrides,
    train=_train,
    page="reasoning.md",
    tables=_tables,
)


if __name__ == "__main__":
    raise SystemExit(main())
