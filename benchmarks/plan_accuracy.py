"""What a plan predicts beside what a training takes, for every tiny recipe and whatever is named.

    python -m benchmarks.plan_accuracy                         # measures what is still missing
    python -m benchmarks.plan_accuracy quickstart              # and another recipe
    python -m benchmarks.plan_accuracy --run runs/3b_hybrid    # and a training that was done
    python -m benchmarks.plan_accuracy --tables                # only writes docs/plan.md anew

Every training runs in a process of its own. A recipe that has a result is not measured again;
remove its file in benchmarks/results/plan/ to do so.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import alone, result, tables
from valkyrie_core import Recipe, runs
from valkyrie_core.errors import ValkyrieError
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.machine.memory import peak_memory
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.plan.counter import count_step
from valkyrie_core.train.device import resolve_device, resolve_precision
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

PAGE = result.ROOT / "docs" / "plan.md"
FOLDER = result.RESULTS / "plan"
TINY = sorted(path.stem for path in (result.ROOT / "recipes" / "tiny").glob("*.yaml"))
RECIPES = [f"tiny/{name}" for name in TINY]
STEPS = 6
"""Of a training that is measured, where the recipe has more: enough for seconds and memory."""


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing, then writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("recipes", nargs="*", help="besides the tiny ones: names or files")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a recipe that is no tiny one")
    parser.add_argument("--run", type=Path, help="a run's folder: what its last sitting took")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        if options.run is not None:
            _take(options.run)
        for recipe in [] if options.tables or options.run else [*RECIPES, *options.recipes]:
            if not _file(recipe).exists():
                log.info("%s", recipe)
                _measure(recipe, None if recipe in RECIPES else options.steps)
        _write_page()
    except KeyboardInterrupt:
        log.warning("stopped; go on with: python -m benchmarks.plan_accuracy")
        return 130
    except ValkyrieError as error:
        log.error("%s", error)
        return error.exit_code
    except (OSError, result.ResultError) as error:
        log.error("%s", error)
        return 1
    return 0


def _file(recipe: str) -> Path:
    return FOLDER / f"{Path(recipe).stem}.json"


def _take(run: Path) -> None:
    """The result of a training that was done: its whole last sitting, from its report."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    if report["measured"] is None or report["measured"]["seconds_per_step"] is None:
        raise OSError(f"{run}: its last sitting was too short to be measured")
    real = {
        "parameters": report["parameters"],
        "process_peak": report["measured"]["peak_bytes"],
        "step_seconds": report["measured"]["seconds_per_step"],
        "checkpoint": sum(f.stat().st_size for f in Path(report["checkpoint"]).iterdir()),
    }
    _write(report["run"], Recipe.from_json(run / "recipe.json"), real)


def _measure(name: str, steps: int | None) -> None:
    recipe = Recipe.load(name)
    precision = resolve_precision(recipe.train.precision, resolve_device(recipe.device))
    # once for what is built and packed on the way: compilers and texts are no part of a training
    for _ in range(2 if name in RECIPES else 1):
        peak, seconds, checkpoint = alone.call(
            "benchmarks.plan_accuracy", "train_alone", name, steps or recipe.train.steps
        )
    model, counted = count_alone(recipe, precision)
    real = {
        "parameters": model,
        "flops_per_token": counted,
        "checkpoint": checkpoint,
        "process_peak": peak,
        "step_seconds": seconds,
    }
    _write(name, recipe, real)


def _write(name: str, recipe: Recipe, real: dict[str, float]) -> None:
    """Keeps what was measured beside the plan."""
    report = runs.plan(recipe, progress=lambda what: log.info("  %s", what))
    precision = resolve_precision(recipe.train.precision, resolve_device(recipe.device))
    size, cost = report.bytes, report.flops_per_token
    predicted = {
        "parameters": report.parameters.total,
        "flops_per_token": cost.train,
        "checkpoint": size.checkpoint,
        "process_peak": size.process_peak,
        "step_seconds": report.seconds[0].step,
    }
    content = {
        "recipe": name,
        "precision": precision,
        "origin": result.origin()._asdict(),
        "predicted": predicted,
        "measured": real,
        "held": size.held,
        "tensors": size.peak,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    Storage().replace_json(_file(name), content)


def count_alone(recipe: Recipe, precision: Precision) -> tuple[int, float]:
    """(parameters, training operations per token) of a real model of the recipe."""
    torch.manual_seed(0)
    model = HybridLM(recipe.model)
    vocabulary = recipe.model.vocab_size or 0
    tokens_BT = torch.randint(0, vocabulary, (1, recipe.train.context_len))
    counted = count_step(model, tokens_BT, precision)
    return model.num_parameters(), counted / tokens_BT.numel()


def train_alone(name: str, steps: int) -> list[float]:
    """Trains in this process: [peak bytes, seconds per step, bytes of the last checkpoint]."""
    with tempfile.TemporaryDirectory() as folder:
        report = runs.train(Recipe.load(name, [f"runs_dir={folder}"]), steps=int(steps))
        assert report.checkpoint is not None
        size = sum(file.stat().st_size for file in Path(report.checkpoint).iterdir())
    if report.measured is None or report.measured.seconds_per_step is None:
        raise OSError("the training was too short to be measured")
    return [float(peak_memory() or 0), report.measured.seconds_per_step, float(size)]


ROWS = {
    "parameters": ("parameters", 1, "{:,.0f}"),
    "flops_per_token": ("training FLOPs per token", 1e3, "{:,.1f}k"),
    "checkpoint": ("a checkpoint, KiB", 1 << 10, "{:,.1f}"),
    "process_peak": ("peak of the process, MiB", 1 << 20, "{:,.0f}"),
    "step_seconds": ("seconds per step", 1, "{:.3g}"),
}


def _write_page() -> None:
    found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    if not found:
        log.warning("there is no result yet")
        return
    text = tables.put(PAGE.read_text(encoding="utf-8"), "accuracy", _table(found))
    PAGE.write_text(text, encoding="utf-8")


def _table(found: list[dict[str, Any]]) -> str:
    lines = ["| recipe | | predicted | measured | off by |", "|---|---|---:|---:|---:|"]
    for one in found:
        for key, (title, unit, form) in ROWS.items():
            predicted, real = one["predicted"].get(key), one["measured"].get(key)
            if predicted is None or real is None:
                continue
            cells = [form.format(value / unit) for value in (predicted, real)]
            off = f"{predicted / real - 1:+.1%}"
            lines.append(f"| {one['recipe']} | {title} | {' | '.join(cells)} | {off} |")
    origins = [result.Origin(**one["origin"]) for one in found]
    where = sorted({f"{x.kind}, {x.threads} threads, {x.date}" for x in origins})
    precisions = ", ".join(f"{one['recipe']} {one['precision']}" for one in found)
    lines += ["", f"{'; '.join(where)}. Precision: {precisions}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
