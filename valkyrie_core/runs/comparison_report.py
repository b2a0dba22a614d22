"""What a comparison answers: its report, and the files that it leaves.

From here on all is a function of what was trained and scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from valkyrie_core.compare.contenders import Contender, design_hash
from valkyrie_core.compare.curves import Curve, at_equal_spending
from valkyrie_core.compare.figure import EQUAL, draw_comparison
from valkyrie_core.compare.matching import Match, Trial, flops_of, tokens_of
from valkyrie_core.compare.page import comparison_page
from valkyrie_core.compare.scores import FEW_DOCUMENTS, STRETCH, RunScores, bits_SI
from valkyrie_core.compare.sentences import sentence
from valkyrie_core.compare.verdict import metrics, primary
from valkyrie_core.errors import ResourceError
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.plan.parameters import count_parameters, unrolled_parameters, weightless
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import (
    ComparedDepths,
    ComparedDesign,
    ComparedView,
    CompareReport,
    ComparisonTiming,
    DroppedDesign,
    TrainReport,
)
from valkyrie_core.train.checkpoint import step_directory
from valkyrie_core.train.curves import draw_curves
from valkyrie_core.train.metrics import read_metrics
from valkyrie_core.train.storage import Storage

SUMMARY, PICTURE, PAGE = "comparison_summary.json", "comparison_plots.png", "comparison.md"


class Trained(NamedTuple):
    """One training and what it scores."""

    trial: Trial
    report: TrainReport
    scores: RunScores
    curve: Curve


def comparison_report(
    designs: Sequence[Contender],
    by_name: Mapping[str, Sequence[Trained]],
    match: Match,
    notes: Sequence[str],
    speed: Mapping[str, float],
    folder: Path,
    precision: Precision,
    dropped: Sequence[DroppedDesign] = (),
) -> CompareReport:
    """The report; the rest of `timing` is filled in by who watched the clock."""
    scores = {name: [one.scores for one in done] for name, done in by_name.items()}
    halved = sum(one.by_score for one in dropped)
    found = metrics(scores, halved)
    reference = designs[0].name
    trained = {name: done[0].trial.recipe for name, done in by_name.items()}
    described = [_design(one, by_name[one.name]) for one in designs]
    curves = {name: [one.curve for one in done] for name, done in by_name.items()}
    views, equal_seconds = _views(described, curves, match, speed)
    if match == "seconds":
        equal_seconds = {one.name: one.score - described[0].score for one in described[1:]}
    return CompareReport(
        verdict=sentence(reference, found, match),
        reference=reference,
        match=match,
        seeds=len(by_name[reference]),
        precision=precision,
        contenders=described,
        dropped=list(dropped),
        metrics=found,
        views=views,
        notes=[*notes, *_notes(designs, trained, scores, halved)],
        directory=str(folder),
        timing=ComparisonTiming(
            step_seconds={one.name: speed[one.name] for one in designs},
            training_seconds={
                name: [one.report.seconds for one in done] for name, done in by_name.items()
            },
            difference_at_equal_seconds=equal_seconds,
        ),
    )


def _design(contender: Contender, done: Sequence[Trained]) -> ComparedDesign:
    recipe = done[0].trial.recipe
    model = weightless(recipe.model)
    size = count_parameters(model)
    bits_of, bytes_I = bits_SI([one.scores for one in done], list(done[0].scores.corpora))
    means = [float(row @ bytes_I / bytes_I.sum()) for row in bits_of]
    return ComparedDesign(
        name=contender.name,
        source=contender.source,
        parameters=size.total,
        active_parameters=size.active,
        unrolled_parameters=unrolled_parameters(model),
        steps=recipe.train.steps,
        tokens=tokens_of(recipe),
        training_flops=flops_of(recipe),
        runs=[one.report.directory for one in done],
        seeds=[one.trial.seed for one in done],
        score=math.fsum(means) / len(means),
        scores=means,
        primary=[primary(one.scores).value for one in done],
        accuracy=_accuracy([one.scores for one in done]),
        depths=_depths([one.scores for one in done]),
    )


def _depths(scores: Sequence[RunScores]) -> dict[str, ComparedDepths]:
    """Means over seeds, by corpus."""
    found = {}
    for name in scores[0].depths:
        own = [run.depths[name] for run in scores]
        early = [one.early for one in own if one.early is not None]
        found[name] = ComparedDepths(
            by_depth=_numbered([one.by_depth for one in own]),
            ended=_numbered([one.ended for one in own]),
            early=math.fsum(early) / len(early) if early else None,
        )
    return found


def _numbered(values: Sequence[Sequence[float]]) -> dict[int, float]:
    """Means over seeds, by depth from 1 on."""
    columns = zip(*values, strict=True)
    return {depth: math.fsum(own) / len(own) for depth, own in enumerate(columns, 1)}


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
    parameters = {one.name: float(one.parameters) for one in described}
    spent = {one.name: float(one.training_flops) for one in described}
    same_size, same_flops = _alike(parameters), match == "flops" or _alike(spent)
    views: dict[Literal["params", "flops", "seconds"], ComparedView] = {
        "params": ComparedView(
            matched=match == "params" or same_size,
            values=parameters,
            # at other parameters a design is another design: no curve tells
            difference_at_equal=(
                final if match in ("params", "tokens") and same_size else dict.fromkeys(others)
            ),
        ),
        "flops": ComparedView(
            matched=same_flops,
            values=spent,
            difference_at_equal=final if same_flops else at_equal_spending(curves, flops),
        ),
        "seconds": ComparedView(
            matched=match == "seconds",
            values=dict.fromkeys(one.name for one in described),
            difference_at_equal=dict.fromkeys(others),
        ),
    }
    seconds = {one.name: speed[one.name] * one.steps for one in described}
    return views, final if _alike(seconds) else at_equal_spending(curves, speed)


def _alike(values: Mapping[str, float]) -> bool:
    """Whether they differ by no more than rounding steps and widths, or a clock, makes them."""
    return max(values.values()) <= EQUAL * min(values.values())


def _notes(
    designs: Sequence[Contender],
    trained: Mapping[str, Recipe],
    scores: Mapping[str, Sequence[RunScores]],
    halved: int,
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
    notes.append("scores are those of the last step, not of the best one")
    if halved:
        notes.append(
            f"{halved} designs were dropped by what they scored in short trainings on the same "
            "text: p counts them as tested"
        )
    return notes


def keep_comparison(
    report: CompareReport, by_name: Mapping[str, Sequence[Trained]], folder: Path, command: str
) -> None:
    """Writes the plots, the page, the results of each design, and last the summary.

    Raises ResourceError where the folder can't be written.
    """
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
        for one in report.dropped:
            # of an earlier comparison here, in which it was trained to the end
            (folder / f"training_results_{one.name}.json").unlink(missing_ok=True)
            (folder / f"training_curves_{one.name}.png").unlink(missing_ok=True)
        storage.replace_json(folder / SUMMARY, report.model_dump(mode="json"))
    except OSError as error:
        raise ResourceError(f"{folder} can't be written: {error}") from error


def _training(one: Trained) -> dict[str, Any]:
    best = one.report.best_step
    path = Path(one.report.directory) / "checkpoints"
    return {
        "seed": one.trial.seed,
        "report": one.report.model_dump(mode="json"),
        "best_checkpoint": None if best is None else str(step_directory(path, best)),
    }
