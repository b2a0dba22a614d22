"""Comparing designs, with all parts wired together."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from valkyrie_core.compare.contenders import Contender, contenders, design_hash
from valkyrie_core.compare.halving import rungs, seconds_of
from valkyrie_core.compare.matching import (
    Match,
    at_equal,
    on_one_text,
    shortened,
    usual_place,
)
from valkyrie_core.compare.speed import step_seconds
from valkyrie_core.compare.vary import varied
from valkyrie_core.compare.verdict import best_of, primary
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import MissingError, ResourceError, UsageError
from valkyrie_core.machine.hardware import processor_key
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import CompareReport, DroppedDesign
from valkyrie_core.runs.comparison_report import comparison_report, keep_comparison
from valkyrie_core.runs.comparison_trials import Begin, Reading, TrialRunner
from valkyrie_core.runs.folder import own_folder
from valkyrie_core.runs.training import tell_now_and_then
from valkyrie_core.train.device import resolve_device, resolve_precision
from valkyrie_core.train.storage import Storage
from valkyrie_core.train.track import require_tracker

log = logging.getLogger("valkyrie")

SPEED = "step_seconds.json"
"""What steps took when the comparison was begun: it fixes how many there are at equal seconds."""
LONGEST_NAME = 100
LEAST_TOKENS = 65_536
"""Of each corpus that is scored, at least, where it has so many."""


def compare_designs(
    arguments: Sequence[str],
    *,
    seeds: int,
    steps: int | None,
    share: float,
    match: Match,
    runs_dir: str,
    out: Path | None,
    resume: bool,
    begin: Begin,
    reading: Reading | None,
    command: str,
    vary: Sequence[str] = (),
    budget: str | float | None = None,
) -> CompareReport:
    """See `valkyrie_core.runs.compare`."""
    began = time.perf_counter()
    if isinstance(budget, str):
        budget = seconds_of(budget)
    designs, keys, title = _designs(arguments, vary, runs_dir)
    if steps is None and share != 1:
        steps = max(1, round(share * designs[0].recipe.train.steps))
    recipes, notes = on_one_text(designs, steps, keys)
    for recipe in recipes.values():
        # else a training would say so an hour later
        require_tracker(recipe.train.track)
    if match == "params":
        # before anything is looked up or measured: it makes other designs of them
        recipes, more = at_equal(recipes, match, {})
        notes += more
    folder = out or Path("results", _folder_name(title, match))
    if resume and _speed_key(recipes) not in _kept_speeds(folder):
        raise MissingError(
            f"there is no such comparison in {folder} to go on with", hint="leave out --resume"
        )
    with own_folder(folder, "compares"):
        first = recipes[designs[0].name]
        text = prepare(first.data, progress=tell_now_and_then()).fingerprint
        device = resolve_device(first.device)
        precision = resolve_precision(first.train.precision, device)
        speed = _speed(folder, recipes)
        if match != "params":
            recipes, more = at_equal(recipes, match, speed)
            notes += more
        runner = TrialRunner(
            reference=designs[0].name,
            folder=folder,
            runs_dir=usual_place(designs[0], runs_dir),
            text=text,
            tokens=max(LEAST_TOKENS, first.train.eval_tokens),
            context_len=first.train.longest_context,
            precision=precision,
            speed=speed,
            begin=begin,
            reading=reading,
            command=command,
        )
        own_seeds = range(designs[0].recipe.seed, designs[0].recipe.seed + seeds)
        left, dropped = designs, list[DroppedDesign]()
        if budget is not None:
            left, dropped = _halved(runner, designs, recipes, own_seeds, budget)
        by_name, diverged = runner.run(left, recipes, own_seeds)
        dropped += [_dropped(one, diverged[one.name]) for one in left if one.name in diverged]
        left = [one for one in left if one.name in by_name]
        report = comparison_report(left, by_name, match, notes, speed, folder, precision, dropped)
        clock = {
            "seconds": time.perf_counter() - began,
            "machine": _machine(str(device)),
            "date": datetime.now(UTC).date().isoformat(),
        }
        timing = report.timing.model_copy(update=clock)
        report = report.model_copy(update={"timing": timing})
        keep_comparison(report, by_name, folder, command)
    return report


def _machine(device: str) -> str:
    model, threads, version = processor_key(device).split("|")
    return f"{model}, {threads}, torch {version}"


def _halved(
    runner: TrialRunner,
    designs: Sequence[Contender],
    recipes: Mapping[str, Recipe],
    seeds: range,
    budget: float,
) -> tuple[list[Contender], list[DroppedDesign]]:
    """The designs that the budget has room for, after rounds of short trainings; and the others.

    The first one goes on in any case.
    """
    whole = {one.name: recipes[one.name].train.steps * runner.speed[one.name] for one in designs}
    shortest = min(recipes[one.name].train.steps for one in designs)
    rounds = rungs(whole, len(seeds), budget, shortest)
    counts = [len(designs) - 1, *(rung.keep for rung in rounds)]
    for count, rung in zip(counts, rounds, strict=False):
        log.info(
            "the budget: %d designs train %.1f %% of their steps, %d go on",
            count,
            100 * rung.share,
            rung.keep,
        )
    # what is dropped is decided by a seed that the verdict does not have
    first_seed = seeds.start + len(seeds) * len(designs)
    others, dropped = list(designs[1:]), list[DroppedDesign]()
    for number, rung in enumerate(rounds, 1):
        shorter = {one.name: shortened(recipes[one.name], rung.share) for one in others}
        dearest = sorted((whole[one.name] for one in others), reverse=True)[: rung.keep]
        later = len(seeds) * (whole[runner.reference] + sum(dearest))
        done, diverged = runner.run(others, shorter, range(first_seed, first_seed + 1), later=later)
        found = {name: primary(trained[0].scores) for name, trained in done.items()}
        going = best_of(found, rung.keep)
        for one in others:
            if one.name in going:
                continue
            why = f"round {number} of {len(rounds)}: "
            if one.name in diverged:
                why += diverged[one.name]
            else:
                why += (
                    f"{found[one.name].value:.4f} {found[one.name].unit} after "
                    f"{shorter[one.name].train.steps:,} steps, "
                    f"seed {done[one.name][0].trial.seed}"
                )
            dropped.append(_dropped(one, why, by_score=one.name in found))
            log.info("%s is dropped: %s", one.name, why)
        others = [one for one in others if one.name in going]
    return [designs[0], *others], dropped


def _dropped(one: Contender, why: str, *, by_score: bool = False) -> DroppedDesign:
    return DroppedDesign(name=one.name, source=one.source, why=why, by_score=by_score)


def _designs(
    arguments: Sequence[str], vary: Sequence[str], runs_dir: str
) -> tuple[list[Contender], set[str], str]:
    """What is compared, the keys that are varied, and a name for it all."""
    if not vary:
        designs = contenders(arguments, runs_dir)
        return designs, set(), "_vs_".join(one.name for one in designs)
    if len(arguments) != 1:
        raise UsageError("--vary belongs to one recipe")
    designs, keys = varied(arguments[0], vary)
    # other values are another sweep
    values = hashlib.sha256(json.dumps(sorted(vary)).encode()).hexdigest()[:6]
    title = f"{designs[0].recipe.name}_varied_{'_'.join(sorted(keys))}"
    return designs, keys, f"{title[: LONGEST_NAME - 7]}_{values}"


def _folder_name(title: str, match: Match) -> str:
    """One folder for one comparison; a long name is cut, and told from others by a hash."""
    name = title if match == "tokens" else f"{title}_equal_{match}"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _speed_key(recipes: Mapping[str, Recipe]) -> str:
    """Tells the designs of a comparison; which one is named first changes nothing."""
    designs = {name: design_hash(_without_budget(recipe)) for name, recipe in recipes.items()}
    return hashlib.sha256(json.dumps(sorted(designs.items())).encode()).hexdigest()


def _kept_speeds(folder: Path) -> dict[str, dict[str, float]]:
    """What was measured in earlier sittings; nothing where it can't be read."""
    try:
        return dict(json.loads((folder / SPEED).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _speed(folder: Path, recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Seconds of a step, measured when a comparison of these designs is begun, and kept."""
    key, kept, path = _speed_key(recipes), _kept_speeds(folder), folder / SPEED
    try:
        return {name: float(kept[key][name]) for name in recipes}
    except (KeyError, TypeError, ValueError):
        pass
    seconds = step_seconds(recipes, told=lambda text: log.info("measuring steps: %s", text))
    try:
        Storage().replace_json(path, {**kept, key: seconds})
    except OSError as error:
        raise ResourceError(f"{path} can't be written: {error.strerror}") from error
    return seconds


def _without_budget(recipe: Recipe) -> Recipe:
    """Whatever its number of steps: they don't change what one takes."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 1})})
