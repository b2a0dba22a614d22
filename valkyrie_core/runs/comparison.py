"""Comparing designs, with all parts wired together."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from valkyrie_core.compare.contenders import Contender, contenders, design_hash
from valkyrie_core.compare.curves import Curve, at_equal_spending, curve_of
from valkyrie_core.compare.figure import draw_comparison
from valkyrie_core.compare.matching import (
    Match,
    Trial,
    at_equal,
    flops_of,
    on_one_text,
    tokens_of,
    trials,
)
from valkyrie_core.compare.page import comparison_page
from valkyrie_core.compare.scores import FEW_DOCUMENTS, STRETCH, RunScores, bits_SI, scores_of
from valkyrie_core.compare.speed import step_seconds
from valkyrie_core.compare.vary import varied
from valkyrie_core.compare.verdict import metrics, sentence
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import (
    DivergedError,
    MissingError,
    ResourceError,
    RunInUseError,
    UsageError,
    ValkyrieError,
)
from valkyrie_core.plan.parameters import count_parameters, weightless
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import (
    ComparedDesign,
    ComparedView,
    CompareReport,
    ComparisonTiming,
    TrainReport,
)
from valkyrie_core.runs.training import tell_now_and_then, train_recipe
from valkyrie_core.train.checkpoint import step_directory
from valkyrie_core.train.curves import draw_curves
from valkyrie_core.train.device import resolve_device, resolve_precision
from valkyrie_core.train.metrics import read_metrics
from valkyrie_core.train.progress import StepEvent
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

SUMMARY, PICTURE, PAGE = "comparison_summary.json", "comparison_plots.png", "comparison.md"
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


class _Done(NamedTuple):
    """One training and what it scores."""

    trial: Trial
    report: TrainReport
    scores: RunScores
    curve: Curve


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
    keys: set[str] = set()
    if vary:
        if len(arguments) != 1:
            raise UsageError("--vary belongs to one recipe")
        designs, keys = varied(arguments[0], vary)
        title = f"{designs[0].recipe.name}_varied_{'_'.join(sorted(keys))}"
    else:
        designs = contenders(arguments, runs_dir)
        title = "_vs_".join(one.name for one in designs)
    if steps is None and share != 1:
        steps = max(1, round(share * designs[0].recipe.train.steps))
    recipes, notes = on_one_text(designs, steps, keys)
    folder = out or Path("results", _folder_name(title, match))
    if resume and not (folder / SPEED).exists():
        raise MissingError(
            f"there is no comparison in {folder} to go on with", hint="leave out --resume"
        )
    with _alone(folder):
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
            _Done(
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
        report = _report(designs, by_name, match, notes, speed, folder)
        report = report.model_copy(
            update={
                "timing": report.timing.model_copy(update={"seconds": time.perf_counter() - began})
            }
        )
        _keep(report, by_name, folder, command)
    return report


def _folder_name(title: str, match: Match) -> str:
    """One folder for one comparison; a long name is cut, and told from others by a hash."""
    name = title if match == "tokens" else f"{title}_equal_{match}"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder of a comparison, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder} can't be made: {error.strerror}") from error
    lock = FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUseError(f"another process compares in {folder}") from None
    except OSError as error:
        raise ResourceError(f"{folder} can't be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


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


def _report(
    designs: Sequence[Contender],
    by_name: Mapping[str, Sequence[_Done]],
    match: Match,
    notes: Sequence[str],
    speed: Mapping[str, float],
    folder: Path,
) -> CompareReport:
    scores = {name: [one.scores for one in done] for name, done in by_name.items()}
    found = metrics(scores)
    reference = designs[0].name
    trained = {name: done[0].trial.recipe for name, done in by_name.items()}
    described = [_design(one, by_name[one.name]) for one in designs]
    curves = {name: [one.curve for one in done] for name, done in by_name.items()}
    views, equal_seconds = _views(described, curves, match, speed)
    final = {one.name: one.score - described[0].score for one in described[1:]}
    if match == "seconds":
        equal_seconds = dict(final)
    return CompareReport(
        verdict=sentence(reference, found, match),
        reference=reference,
        match=match,
        seeds=len(by_name[reference]),
        contenders=described,
        metrics=found,
        views=views,
        notes=[*notes, *_notes(designs, trained, scores)],
        directory=str(folder),
        timing=ComparisonTiming(
            step_seconds=dict(speed),
            training_seconds={
                name: [one.report.seconds for one in done] for name, done in by_name.items()
            },
            difference_at_equal_seconds=equal_seconds,
            seconds=0.0,
        ),
    )


def _design(contender: Contender, done: Sequence[_Done]) -> ComparedDesign:
    recipe = done[0].trial.recipe
    size = count_parameters(weightless(recipe.model))
    bits_of, bytes_I = bits_SI([one.scores for one in done], list(done[0].scores.corpora))
    means = [float(row @ bytes_I / bytes_I.sum()) for row in bits_of]
    return ComparedDesign(
        name=contender.name,
        source=contender.source,
        parameters=size.total,
        active_parameters=size.active,
        steps=recipe.train.steps,
        tokens=tokens_of(recipe),
        training_flops=flops_of(recipe),
        runs=[one.report.directory for one in done],
        seeds=[one.trial.seed for one in done],
        score=math.fsum(means) / len(means),
        scores=means,
        accuracy=_accuracy([one.scores for one in done]),
    )


def _accuracy(scores: Sequence[RunScores]) -> dict[str, dict[int, float]]:
    """Mean over seeds, by corpus and level."""
    found: dict[str, dict[int, float]] = {}
    for name, asked in scores[0].answers.items():
        for level in sorted(set(asked.difficulty)):
            right = [
                answered
                for run in scores
                for answered, own in zip(
                    run.answers[name].right, run.answers[name].difficulty, strict=True
                )
                if own == level
            ]
            found.setdefault(name, {})[level] = sum(right) / len(right)
    return found


def _views(
    described: Sequence[ComparedDesign],
    curves: Mapping[str, Sequence[Curve]],
    match: Match,
    speed: Mapping[str, float],
) -> tuple[dict[Literal["params", "flops", "seconds"], ComparedView], dict[str, float | None]]:
    """The comparison under every way to call designs equal; and the part that a clock measured."""
    others = [one.name for one in described[1:]]
    # where trainings were made equal the last scores are the answer
    final: dict[str, float | None] = {
        one.name: one.score - described[0].score for one in described[1:]
    }
    flops = {one.name: one.training_flops / one.steps for one in described}
    views: dict[Literal["params", "flops", "seconds"], ComparedView] = {
        "params": ComparedView(
            matched=match == "params",
            values={one.name: float(one.parameters) for one in described},
            # at other parameters a design is another design: no curve tells
            difference_at_equal=final if match == "params" else dict.fromkeys(others),
        ),
        "flops": ComparedView(
            matched=match == "flops",
            values={one.name: float(one.training_flops) for one in described},
            difference_at_equal=final if match == "flops" else at_equal_spending(curves, flops),
        ),
        "seconds": ComparedView(
            matched=match == "seconds",
            values=dict.fromkeys(one.name for one in described),
            difference_at_equal=dict.fromkeys(others),
        ),
    }
    return views, at_equal_spending(curves, speed)


def _notes(
    designs: Sequence[Contender],
    trained: Mapping[str, Recipe],
    scores: Mapping[str, Sequence[RunScores]],
) -> list[str]:
    notes = []
    for name, corpus in next(iter(scores.values()))[0].corpora.items():
        if corpus.stretches:
            notes.append(
                f"{name} has fewer than {FEW_DOCUMENTS} documents ({corpus.documents}) to score: "
                f"its items are stretches of {STRETCH:,} tokens, and intervals speak of these "
                "documents alone"
            )
    hashes = [design_hash(trained[one.name]) for one in designs]
    for place, one in enumerate(designs):
        if hashes[place] in hashes[:place]:
            other = designs[hashes.index(hashes[place])].name
            notes.append(
                f"{one.name} is the same design as {other}, with other seeds: what is found "
                "between them is chance"
            )
    notes.append("scores are those of the last step, not of the best one: nothing was chosen")
    return notes


def _keep(
    report: CompareReport, by_name: Mapping[str, Sequence[_Done]], folder: Path, command: str
) -> None:
    storage = Storage()
    curves = {name: [one.curve for one in done] for name, done in by_name.items()}
    try:
        storage.replace_bytes(folder / PICTURE, draw_comparison(report, curves))
        page = comparison_page(report, PICTURE, command)
        storage.replace_bytes(folder / PAGE, page.encode(errors="backslashreplace"))
        for name, done in by_name.items():
            results = {"design": name, "trainings": [_training(one) for one in done]}
            storage.replace_json(folder / f"training_results_{name}.json", results)
            rows = read_metrics(Path(done[0].report.directory) / "metrics.jsonl")
            title = f"{name}, seed {done[0].trial.seed}"
            picture = draw_curves(rows, title=title)
            storage.replace_bytes(folder / f"training_curves_{name}.png", picture)
        storage.replace_json(folder / SUMMARY, report.model_dump(mode="json"))
    except OSError as error:
        raise ResourceError(f"{folder} can't be written: {error}") from error


def _training(one: _Done) -> dict[str, Any]:
    best = one.report.best_step
    path = Path(one.report.directory) / "checkpoints"
    return {
        "seed": one.trial.seed,
        "report": one.report.model_dump(mode="json"),
        "best_checkpoint": None if best is None else str(step_directory(path, best)),
    }
