"""Comparing designs, with all parts wired together."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from valkyrie_core.compare.contenders import Contender, contenders, design_hash
from valkyrie_core.compare.curves import curve_of
from valkyrie_core.compare.matching import (
    Match,
    Trial,
    at_equal,
    on_one_text,
    trials,
)
from valkyrie_core.compare.scores import scores_of
from valkyrie_core.compare.speed import step_seconds
from valkyrie_core.compare.vary import varied
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import (
    DivergedError,
    MissingError,
    ResourceError,
    UsageError,
    ValkyrieError,
)
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import (
    CompareReport,
    TrainReport,
)
from valkyrie_core.runs.comparison_report import Trained, comparison_report, keep_comparison
from valkyrie_core.runs.folder import own_folder
from valkyrie_core.runs.training import tell_now_and_then, train_recipe
from valkyrie_core.train.checkpoint import step_directory
from valkyrie_core.train.device import resolve_device, resolve_precision
from valkyrie_core.train.progress import StepEvent
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

SPEED = "step_seconds.json"
"""What steps took when the comparison was begun: it fixes how many there are at equal seconds."""
SCORES = "scores"
LONGEST_NAME = 100
LEAST_TOKENS = 65_536
"""Of each corpus that is scored, at least, where it has so many."""
Begin = Callable[[str, int, int, float], Callable[[StepEvent], None]]
"""Told of a training that begins: its name, its number from 1, how many there are, and seconds that
all the rest takes; gives what is told of its steps."""
Reading = Callable[[str, int, int], None]


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
) -> CompareReport:
    """See `valkyrie_core.runs.compare`."""
    began = time.perf_counter()
    designs, keys, title = _designs(arguments, vary, runs_dir)
    if steps is None and share != 1:
        steps = max(1, round(share * designs[0].recipe.train.steps))
    recipes, notes = on_one_text(designs, steps, keys)
    folder = out or Path("results", _folder_name(title, match))
    if resume and not (folder / SPEED).exists():
        raise MissingError(
            f"there is no comparison in {folder} to go on with", hint="leave out --resume"
        )
    with own_folder(folder, "compares"):
        first = recipes[designs[0].name]
        text = prepare(first.data, progress=tell_now_and_then()).fingerprint
        device = resolve_device(first.device)
        precision = resolve_precision(first.train.precision, device)
        if match == "params":
            recipes, more = at_equal(recipes, match, {})
            speed = _speed(folder, recipes)
        else:
            speed = _speed(folder, recipes)
            recipes, more = at_equal(recipes, match, speed)
        notes += more
        todo = trials(recipes, designs, seeds, runs_dir, text)
        reports = _trained(todo, designs, text, speed, begin, command)
        tokens = max(LEAST_TOKENS, first.train.eval_tokens)
        done = [
            Trained(
                trial,
                report,
                scores_of(
                    Path(report.directory),
                    report.steps,
                    tokens,
                    folder / SCORES / f"{trial.recipe.name}.json",
                    text=text,
                    context_len=first.train.longest_context,
                    precision=precision,
                    progress=reading,
                ),
                curve_of(Path(report.directory)),
            )
            for trial, report in zip(todo, reports, strict=True)
        ]
        by_name = {one.name: [x for x in done if x.trial.contender == one.name] for one in designs}
        report = comparison_report(designs, by_name, match, notes, speed, folder)
        report = report.model_copy(
            update={
                "timing": report.timing.model_copy(update={"seconds": time.perf_counter() - began})
            }
        )
        keep_comparison(report, by_name, folder, command)
    return report


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
    return designs, keys, f"{designs[0].recipe.name}_varied_{'_'.join(sorted(keys))}"


def _folder_name(title: str, match: Match) -> str:
    """One folder for one comparison; a long name is cut, and told from others by a hash."""
    name = title if match == "tokens" else f"{title}_equal_{match}"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _speed(folder: Path, recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Seconds of a step, measured when a comparison of these designs is begun, and kept."""
    designs = {name: design_hash(_without_budget(recipe)) for name, recipe in recipes.items()}
    # in a key's order: which one is named first changes nothing
    key = hashlib.sha256(json.dumps(sorted(designs.items())).encode()).hexdigest()
    path = folder / SPEED
    try:
        kept = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        kept = {}
    try:
        return {name: float(kept[key][name]) for name in designs}
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


def _trained(
    todo: Sequence[Trial],
    designs: Sequence[Contender],
    text: str,
    speed: Mapping[str, float],
    begin: Begin,
    command: str,
) -> list[TrainReport]:
    """The report of every training; what is finished is not trained again."""
    sources = {one.name: one for one in designs}
    found = {
        index: report
        for index, trial in enumerate(todo)
        if (report := _finished(trial, sources[trial.contender], text)) is not None
    }
    ahead = sum(
        trial.recipe.train.steps * speed[trial.contender]
        for index, trial in enumerate(todo)
        if index not in found
    )
    count = len(todo) - len(found)
    number = 0
    for index, trial in enumerate(todo):
        if index in found:
            continue
        number += 1
        shown = f"{trial.contender}, seed {trial.seed}"
        progress = begin(shown, number, count, ahead)
        place = Path(trial.recipe.runs_dir, trial.recipe.name)
        try:
            found[index] = train_recipe(
                trial.recipe,
                # a folder without it was stopped before its first step
                resume=(place / "recipe.json").is_file(),
                steps=None,
                extend_steps=None,
                progress=progress,
                resume_command=command,
            )
        except DivergedError as error:
            raise DivergedError(
                f"{shown}: {error.message}",
                hint="a design that diverges can't be compared: lower its rate in its recipe",
            ) from error
        ahead -= trial.recipe.train.steps * speed[trial.contender]
    return [found[index] for index in range(len(todo))]


def _finished(trial: Trial, source: Contender, text: str) -> TrainReport | None:
    """What a finished training of the same design, text and seed reported: its own, or the
    user's run."""
    usual = Path(trial.recipe.runs_dir).parent / source.recipe.name
    device = resolve_device(trial.recipe.device)
    precision = resolve_precision(trial.recipe.train.precision, device)
    for place in (Path(trial.recipe.runs_dir, trial.recipe.name), source.run or usual):
        try:
            recorded = Recipe.from_json(place / "recipe.json")
            report = TrainReport.model_validate_json((place / "report.json").read_bytes())
        except (ValkyrieError, OSError, ValueError):
            continue
        same = design_hash(recorded) == design_hash(trial.recipe) and recorded.seed == trial.seed
        same &= (report.data_fingerprint, report.precision) == (text, precision)
        whole = report.finished and report.steps == trial.recipe.train.steps
        if same and whole and step_directory(place / "checkpoints", report.steps).is_dir():
            # a run that was moved since lies where it was found
            return report.model_copy(update={"directory": str(place)})
    return None
