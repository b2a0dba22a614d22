"""Searching for a layout, with all parts wired together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from valkyrie_core.allocate.candidates import Candidate, candidates, designed
from valkyrie_core.allocate.choice import CHOICE_RULE, RUNG_RULE, WORST
from valkyrie_core.allocate.figure import draw_search
from valkyrie_core.allocate.jobs import Pace, complete
from valkyrie_core.allocate.page import budget_line, search_page
from valkyrie_core.allocate.proxy import Job, Score, language_context
from valkyrie_core.allocate.search import (
    TASKS,
    Found,
    SearchConfig,
    by_pairs,
    default_folder,
    expected_steps,
    feasible,
    search,
)
from valkyrie_core.allocate.statistics import Mean
from valkyrie_core.allocate.write import check_free, recipe_text, write_new
from valkyrie_core.cache import cache_dir
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import ResourceError, StoppedError, UsageError
from valkyrie_core.recipe import Recipe, Resolved
from valkyrie_core.report import CandidateScore, Estimate, SearchReport
from valkyrie_core.runs.allocation import require_stack
from valkyrie_core.runs.folder import own_folder
from valkyrie_core.runs.training import tell_now_and_then
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.storage import Storage

PICTURE, REPORT, PAGE = "search.png", "search.json", "search.md"
TEXTS = "texts"
"""Holds the fingerprint of the texts that a search was begun with."""
Told = Callable[[Score, int, float | None], None]
"""Told about every training that ended: its score, how many are done, and seconds to go."""


def search_layouts(
    resolved: Resolved,
    config: SearchConfig,
    *,
    out: Path,
    processes: int,
    told: Told,
    resume_command: str,
) -> SearchReport:
    """See `valkyrie_core.runs.allocate_search`."""
    check_free(out)
    recipe = resolved.recipe
    require_stack(recipe)
    # before text is prepared: what can't be searched is told at once
    feasible(recipe, config)
    folder = default_folder(recipe, config)
    with own_folder(folder, "searches"):
        sitting = _Sitting(recipe, config, folder, processes, told)
        try:
            found = sitting.search()
        except StopRequestedError as error:
            raise StoppedError(
                f"stopped by {error} after {sitting.count} trainings, which are kept in {folder}",
                hint=f"go on with: {resume_command}",
            ) from None
        among = candidates(recipe.model)
        chosen = next((one for one in among if one.name == found.choice.name), None)
        report = _search_report(recipe, config, found, folder, out if chosen else None)
        # what took minutes is kept, whatever becomes of the new file
        _keep(report, folder)
        if chosen is not None:
            _write_chosen(resolved, chosen, report, out)
    return report


class _Sitting:
    """One sitting of a search: what is trained in it, and how long the rest takes."""

    def __init__(
        self, recipe: Recipe, config: SearchConfig, folder: Path, processes: int, told: Told
    ) -> None:
        self._recipe, self._config, self._folder = recipe, config, folder
        self._processes, self._told = processes, told
        self._pace = Pace()
        self.count = 0
        """Trainings that are done, those of earlier sittings included."""

    def search(self) -> Found:
        """Raises StopRequestedError after a signal."""
        with StopSignal(then="stopping; the trainings that ended are kept") as stop:
            with stop.immediate():
                # once, before two processes would do it at the same time
                data = prepare(self._recipe.data, cache=cache_dir(), progress=tell_now_and_then())
            self._check_texts(data.fingerprint)
            return search(self._recipe, self._config, lambda jobs: self._train(jobs, stop.poll))

    def _check_texts(self, fingerprint: str) -> None:
        """Scores of other texts are not compared with those of these."""
        path = self._folder / TEXTS
        if not path.exists():
            Storage().replace_bytes(path, fingerprint.encode())
        elif path.read_text(encoding="ascii", errors="replace") != fingerprint:
            raise UsageError(
                f"the texts are not those that {self._folder} was begun with",
                hint="remove that folder to search anew",
            )

    def _train(self, jobs: Sequence[Job], poll: Callable[[], None]) -> list[Score]:
        """One rung."""
        before = [job for job in jobs if (self._folder / job.file).exists()]
        self.count += len(before)
        names = {job.candidate: set(job.layers) for job in jobs}
        baselines = sum(len(kinds) == 1 for kinds in names.values())
        ahead = expected_steps(len(names), baselines, self._config, jobs[0].rung)
        self._pace.ahead(ahead - sum(job.steps for job in before))
        return complete(
            jobs,
            self._folder,
            self._recipe,
            self._config.proxy,
            processes=self._processes,
            poll=poll,
            done=self._done,
        )

    def _done(self, score: Score) -> None:
        self.count += 1
        self._pace.made(score.job.steps)
        self._told(score, self.count, self._pace.eta_seconds)


def _write_chosen(resolved: Resolved, chosen: Candidate, report: SearchReport, out: Path) -> None:
    reasons = [
        f"{report.recipe}, its layers chosen by `valkyrie allocate --search`: {chosen.name}.",
        f"{report.reason}.",
        *_score_lines(report),
        f"{budget_line(report)}.",
        "The ffns are resized so that all candidates have the parameters of the original.",
    ]
    text, _ = recipe_text(
        resolved, designed(resolved.recipe.model, chosen), suffix="allocated", reasons=reasons
    )
    write_new(out, text)


def _score_lines(report: SearchReport) -> list[str]:
    last = max(one.rung for one in report.candidates)
    return [
        f"  {one.candidate}: {_estimate_text(one.bpb, 4)} bits per byte, recall "
        f"{_estimate_text(one.recall, 3)}, {one.decode_bytes:,} bytes per decoded token"
        for one in report.candidates
        if one.rung == last
    ]


def _estimate_text(value: Estimate, digits: int) -> str:
    if value.mean is None:
        return "diverged"
    half = "" if value.half_width is None else f" +- {value.half_width:.{digits}f}"
    return f"{value.mean:.{digits}f}{half}"


def _search_report(
    recipe: Recipe, config: SearchConfig, found: Found, folder: Path, out: Path | None
) -> SearchReport:
    proxy = config.proxy
    rows = []
    for number in sorted({rung for rung, _ in found.scored}, reverse=True):
        rung = [one for reached, one in found.scored if reached == number]
        rows += [
            CandidateScore(
                candidate=one.name,
                rung=number,
                is_baseline=one.is_baseline,
                bpb=_estimate(one.mean_bpb),
                recall=_estimate(one.mean_recall),
                recall_by_pairs=by_pairs(one.name, number, found.scores),
                decode_bytes=one.decode_bytes,
                training_flops=one.training_flops,
                pareto=(number, one.name) in found.unbeaten,
            )
            for one in rung
        ]
    sizes = {
        task: [score.parameters for score in found.scores if score.job.task == task]
        for task in TASKS
    }
    return SearchReport(
        recipe=recipe.name,
        folder=str(folder),
        candidates=rows,
        chosen=found.choice.name,
        reason=found.choice.reason,
        seeds_needed=found.choice.seeds_needed,
        rules=[f"Going on: {RUNG_RULE}", f"Chosen: {CHOICE_RULE}"],
        budget={
            "language width": min(proxy.language.width, recipe.model.dim),
            "language steps": proxy.language.steps,
            "language tokens per step": proxy.language.batch_size * language_context(recipe, proxy),
            "recall width": min(proxy.recall.width, recipe.model.dim),
            "recall steps": proxy.recall.steps,
            "recall tokens per step": proxy.recall.batch_size * proxy.recall.mqar.length,
        },
        proxy_parameters={task: (min(own), max(own)) for task, own in sizes.items()},
        trainings=len(found.scores),
        training_seconds=sum(score.seconds for score in found.scores),
        out=None if out is None else str(out),
    )


def _estimate(mean: Mean) -> Estimate:
    value = None if mean.value == WORST else mean.value
    half = None if value is None else mean.half_width
    return Estimate(mean=value, half_width=half, seeds=mean.seeds)


def _keep(report: SearchReport, folder: Path) -> None:
    storage = Storage()
    try:
        storage.replace_bytes(folder / PICTURE, draw_search(report))
        storage.replace_json(folder / REPORT, report.model_dump(mode="json", by_alias=True))
        storage.replace_bytes(folder / PAGE, search_page(report, PICTURE).encode())
    except OSError as error:
        raise ResourceError(f"{folder} can't be written: {error}") from error
