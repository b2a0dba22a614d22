"""What the ratio of recurrent to attention layers does to loss and to recall.

    python -m benchmarks.ratio              # trains what is still missing, then writes the tables
    python -m benchmarks.ratio --tables     # only writes docs/allocate.md anew

A queue that outlives an interruption: one file a training. All models of a task have equal
parameters, steps and data; only the layout differs. Loss is that of the quickstart's text in bits
per byte, recall the share of MQAR queries (Arora et al. 2023, arXiv 2312.04927) by number of pairs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import result, tables
from valkyrie_core import Recipe
from valkyrie_core.allocate.jobs import Pace, complete
from valkyrie_core.allocate.layout import from_ratio
from valkyrie_core.allocate.page import estimate
from valkyrie_core.allocate.proxy import Job, LanguageProxy, ProxyConfig, RecallProxy, Score
from valkyrie_core.allocate.search import TASKS
from valkyrie_core.allocate.statistics import Mean, difference, mean_of
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import StoppedError, UsageError, ValkyrieError
from valkyrie_core.report import Estimate
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

RECIPE = "quickstart"
RATIOS = ("0:4", "1:3", "2:2", "3:1", "4:0")
"""Recurrent to attention layers."""
SEEDS = (0, 1, 2)
# recall has a long way to go without attention: 400 steps show none of it, 1000 where it ends
PROXY = ProxyConfig(language=LanguageProxy(steps=600), recall=RecallProxy(steps=1000))
PROCESSES = 2
PAGE = result.ROOT / "docs" / "allocate.md"
FOLDER = result.RESULTS / "ratio"
STUDY = "study.json"


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, then writes the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ratio", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tables", action="store_true", help="train nothing, write the page")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="one thread each")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        recipe = Recipe.load(RECIPE)
        if not options.tables:
            study(recipe, PROXY, SEEDS, FOLDER, processes=options.processes)
        write_page(PAGE, FOLDER)
    except StoppedError as error:
        log.warning("%s; go on with: python -m benchmarks.ratio", error)
        return error.exit_code
    except ValkyrieError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def study(
    recipe: Recipe,
    proxy: ProxyConfig,
    seeds: Sequence[int],
    folder: Path,
    *,
    processes: int,
    ratios: Sequence[str] = RATIOS,
) -> list[Score]:
    """The scores of all ratios, tasks and seeds; what the folder lacks is trained.

    Raises UsageError where the folder holds a study of other settings, StoppedError after a signal.
    """
    jobs = ratio_jobs(recipe, proxy, seeds, ratios)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"recipe": recipe.fingerprint(), "proxy": proxy.model_dump(mode="json")}
    if (folder / STUDY).exists():
        before = json.loads((folder / STUDY).read_text(encoding="utf-8"))
        if {key: before[key] for key in settings} != settings:
            raise UsageError(f"{folder} holds a study of other settings: remove it first")
    else:
        origin = result.origin()._asdict()
        Storage().replace_json(folder / STUDY, {**settings, "origin": {**origin, "threads": 1}})
    prepare(recipe.data)
    pace = Pace()
    pace.ahead(sum(job.steps for job in jobs if not (folder / job.file).exists()))

    def done(score: Score) -> None:
        pace.made(score.job.steps)
        rest = "-" if pace.eta_seconds is None else f"{pace.eta_seconds / 60:.0f} min"
        log.info("%s in %.0f s, about %s left", score.job.file, score.seconds, rest)

    try:
        with StopSignal() as stop:
            return complete(
                jobs, folder, recipe, proxy, processes=processes, poll=stop.poll, done=done
            )
    except StopRequestedError as error:
        raise StoppedError(f"stopped by {error}") from None


def ratio_jobs(
    recipe: Recipe, proxy: ProxyConfig, seeds: Sequence[int], ratios: Sequence[str]
) -> list[Job]:
    """All trainings; one seed after the other, so that an interrupted study has whole seeds."""
    num_layers = len(recipe.model.core.layers)
    steps = {"language": proxy.language.steps, "recall": proxy.recall.steps}
    return [
        Job(
            candidate=ratio.replace(":", "to"),
            layers=from_ratio(ratio, num_layers).layers,
            window=None,
            task=task,
            rung=1,
            seed=seed,
            steps=steps[task],
        )
        for seed in seeds
        for ratio in ratios
        for task in TASKS
    ]


def write_page(page: Path, folder: Path) -> None:
    """Puts the tables of what the folder holds into the page; UsageError where that is nothing."""
    scores = [
        Score.model_validate_json(path.read_bytes())
        for path in sorted(folder.glob("*-rung1-*.json"))
    ]
    if not scores:
        raise UsageError("there is no result yet", hint="python -m benchmarks.ratio")
    known = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    text = tables.put(page.read_text(encoding="utf-8"), "ratio", ratio_table(scores, known))
    page.write_text(text, encoding="utf-8")


def ratio_table(scores: Sequence[Score], study: dict[str, Any]) -> str:
    """The table by ratio, what it says about loss and recall, and where it was measured."""
    ratios = list(dict.fromkeys(x.job.candidate for x in sorted(scores, key=_attention_first)))
    pairs = sorted({number for score in scores for number in score.recall})
    heads = [f"recall, {number} pairs" for number in pairs]
    lines = [
        f"| recurrent : attention | layers | seeds | bits per byte | {' | '.join(heads)} |",
        f"|---|---|---:|---:{'|---:' * len(pairs)}|",
    ]
    for ratio in ratios:
        own = [score for score in scores if score.job.candidate == ratio]
        bits = _by_seed(own, "language")
        recall = [_text([x.recall[n] for x in own if x.recall], 3) for n in pairs]
        layers = "".join(own[0].job.layers)
        lines.append(
            f"| {ratio.replace('to', ' : ')} | {layers} | {len(bits)} | "
            f"{_text(list(bits.values()), 4)} | {' | '.join(recall)} |"
        )
    return "\n".join([*lines, "", *_findings(scores, ratios), "", _where(scores, study)])


def _attention_first(score: Score) -> int:
    return score.job.layers.count("R")


def _by_seed(scores: Sequence[Score], task: str) -> dict[int, float]:
    """Bits per byte, or recall over all numbers of pairs, by seed; what diverged is left out."""
    found = {}
    for score in scores:
        if score.job.task == task == "language" and score.bpb is not None:
            found[score.job.seed] = score.bpb
        elif score.job.task == task == "recall":
            found[score.job.seed] = sum(score.recall.values()) / len(score.recall)
    return dict(sorted(found.items()))


def _text(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    return estimate(_estimate(mean_of(values)), digits)


def _estimate(mean: Mean) -> Estimate:
    return Estimate(mean=mean.value, half_width=mean.half_width, seeds=mean.seeds)


def _findings(scores: Sequence[Score], ratios: Sequence[str]) -> list[str]:
    """Every ratio against 3:1 (or the last one there is), paired by seed."""
    reference = "3to1" if "3to1" in ratios else ratios[-1]
    lines = []
    for task, what, digits in (("language", "bits per byte", 4), ("recall", "recall", 3)):
        cells = []
        base = _by_seed([x for x in scores if x.job.candidate == reference], task)
        for ratio in ratios:
            own = _by_seed([x for x in scores if x.job.candidate == ratio], task)
            seeds = sorted(set(own) & set(base))
            if ratio == reference or not seeds:
                continue
            change = difference([own[seed] for seed in seeds], [base[seed] for seed in seeds])
            half = "" if change.half_width is None else f" ± {change.half_width:.{digits}f}"
            sure = "" if change.reaches_zero else " (surely)"
            cells.append(f"{ratio.replace('to', ':')} {change.value:+.{digits}f}{half}{sure}")
        against = reference.replace("to", ":")
        lines.append(f"- {what} against {against}, paired by seed: {'; '.join(cells)}")
    return lines


def _where(scores: Sequence[Score], study: dict[str, Any]) -> str:
    origin = result.Origin(**{**study["origin"], "flags": tuple(study["origin"]["flags"])})
    proxy = ProxyConfig.model_validate(study["proxy"])
    language, recall = proxy.language, proxy.recall
    sizes = {
        task: sorted({score.parameters for score in scores if score.job.task == task})
        for task in TASKS
    }
    told = {
        task: f"{own[0]:,} to {own[-1]:,} parameters" if own else "-" for task, own in sizes.items()
    }
    seconds = sum(score.seconds for score in scores)
    return (
        f"Means and Student's 95 % intervals over the seeds. Text: {told['language']}, width "
        f"{language.width}, {language.steps} steps of {language.batch_size} x "
        f"{language.context_len} tokens. MQAR: {told['recall']}, width {recall.width}, "
        f"{recall.steps} steps of {recall.batch_size} x {recall.mqar.length} tokens, vocabulary "
        f"{recall.mqar.vocab_size}. {origin.kind}, one thread a training, {seconds / 60:.0f} "
        f"minutes of one thread, {origin.date}."
    )


if __name__ == "__main__":
    sys.exit(main())
