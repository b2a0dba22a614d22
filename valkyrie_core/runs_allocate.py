"""Allocating layers, with all parts wired together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from valkyrie_core.allocate import layout as layouts
from valkyrie_core.allocate.candidates import Candidate, candidates, designed
from valkyrie_core.allocate.choice import CHOICE_RULE, RUNG_RULE, WORST, pareto_marks
from valkyrie_core.allocate.design import Design, rearranged
from valkyrie_core.allocate.figure import draw_search
from valkyrie_core.allocate.importance import measure, text_windows
from valkyrie_core.allocate.jobs import Pace, complete, kept
from valkyrie_core.allocate.layout import Layout
from valkyrie_core.allocate.match import Match
from valkyrie_core.allocate.page import budget_line, search_page
from valkyrie_core.allocate.picture import picture
from valkyrie_core.allocate.proxy import Job, Score
from valkyrie_core.allocate.search import (
    TASKS,
    Found,
    SearchConfig,
    by_pairs,
    default_folder,
    expected_steps,
    search,
)
from valkyrie_core.allocate.statistics import Mean
from valkyrie_core.allocate.write import check_free, recipe_text, write_new
from valkyrie_core.cache import cache_dir
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import ResourceError, RunInUseError, StoppedError, UsageError
from valkyrie_core.inventory import RunPlace
from valkyrie_core.nn.model import HybridLMConfig
from valkyrie_core.recipe import Recipe, Resolved
from valkyrie_core.report import (
    AllocateReport,
    CandidateScore,
    Estimate,
    ImportanceReport,
    LayerImportance,
    LayerPicture,
    MatchedSize,
    SearchReport,
    StackPicture,
)
from valkyrie_core.runs_train import tell_now_and_then
from valkyrie_core.train.load import load_run
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.storage import Storage

PICTURE, REPORT, PAGE = "search.png", "search.json", "search.md"
Told = Callable[[Score, int, float | None], None]
"""Told about every training that ended: its score, how many are done, and seconds to go."""


def show_or_design(
    resolved: Resolved,
    *,
    ratio: str | None,
    pattern: str | None,
    preset: str | None,
    match: Match | None,
    out: Path | None,
) -> AllocateReport:
    """See `valkyrie_core.runs.allocate`."""
    recipe = resolved.recipe
    layout = _layout(recipe.model, ratio, pattern, preset)
    context_len = recipe.train.longest_context
    stack = _picture(recipe.model, context_len)
    if layout is None:
        for option, value in (("--match", match), ("--out", out)):
            if value is not None:
                raise UsageError(
                    f"{option} belongs to a design: --ratio, --pattern, --preset or --search"
                )
        return AllocateReport(recipe=recipe.name, context_len=context_len, stack=stack)
    if out is not None:
        check_free(out)
    design = rearranged(recipe.model, layout, match=match, context_len=context_len)
    if out is not None:
        text, _ = recipe_text(
            resolved, design.model, suffix=_suffix(layout), reasons=_design_reasons(recipe, design)
        )
        write_new(out, text)
    return AllocateReport(
        recipe=recipe.name,
        context_len=context_len,
        stack=stack,
        asked=layout.asked,
        design=_picture(design.model, context_len),
        notes=list(design.notes),
        size=None if design.sizes is None else _size(design),
        out=None if out is None else str(out),
    )


def _layout(
    model: HybridLMConfig, ratio: str | None, pattern: str | None, preset: str | None
) -> Layout | None:
    asked = [value for value in (ratio, pattern, preset) if value is not None]
    if len(asked) > 1:
        raise UsageError("--ratio, --pattern and --preset are three ways to say one thing")
    num_layers = len(model.core.layers)
    if ratio is not None:
        return layouts.from_ratio(ratio, num_layers)
    if pattern is not None:
        return layouts.from_pattern(pattern, num_layers, tuple(model.core.blocks))
    return None if preset is None else layouts.from_preset(preset, num_layers)


def _suffix(layout: Layout) -> str:
    kind, _, rest = layout.asked.partition(" ")
    return rest.replace(":", "to") if kind in ("ratio", "preset") else kind


def _design_reasons(recipe: Recipe, design: Design) -> list[str]:
    return [
        f"{recipe.name}, its layers rearranged by `valkyrie allocate`: {design.layout.asked}, "
        f"which is {design.pattern}.",
        *(f"- {note}." for note in design.notes),
        *([] if design.sizes else ["- sizes are not matched: other layers, other costs."]),
    ]


def _picture(model: HybridLMConfig, context_len: int) -> StackPicture:
    rows = picture(model, context_len)
    flops = sum(row.flops for row in rows)
    return StackPicture(
        pattern=layouts.brief(model.core.layers),
        parameters=sum(row.parameters for row in rows),
        flops_per_token=flops,
        state_bytes=sum(row.state_bytes for row in rows),
        rows=[LayerPicture(**row._asdict(), flops_share=row.flops / flops) for row in rows],
    )


def _size(design: Design) -> MatchedSize:
    assert design.sizes is not None
    sizes = design.sizes
    return MatchedSize(
        match=sizes.match,
        wanted=sizes.wanted,
        before=sizes.before,
        after=sizes.after,
        difference=sizes.difference,
        hidden_dims=sizes.widths,
    )


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
    among = candidates(recipe.model)
    folder = default_folder(recipe, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} can't be made: {error.strerror}") from error
    lock = FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUseError(f"another process searches in {folder}") from None
    baselines = sum(one.is_baseline for one in among)
    pace = Pace()
    count = 0

    def done(score: Score) -> None:
        nonlocal count
        count += 1
        pace.made(score.job.steps)
        told(score, count, pace.eta_seconds)

    try:
        with StopSignal() as stop:
            with stop.immediate():
                # once, before two processes would do it at the same time
                prepare(recipe.data, cache=cache_dir(), progress=tell_now_and_then())

            def train(jobs: Sequence[Job]) -> list[Score]:
                nonlocal count
                before = [job for job in jobs if kept(folder, job) is not None]
                count += len(before)
                going = len({job.candidate for job in jobs})
                ahead = expected_steps(going, baselines, config, jobs[0].rung)
                pace.ahead(ahead - sum(job.steps for job in before))
                return complete(
                    jobs,
                    folder,
                    recipe,
                    config.proxy,
                    processes=processes,
                    poll=stop.poll,
                    done=done,
                )

            found = search(recipe, config, train)
    except StopRequestedError as error:
        raise StoppedError(
            f"stopped by {error} after {count} trainings, which are kept in {folder}",
            hint=f"go on with: {resume_command}",
        ) from None
    finally:
        lock.release()
    chosen = next((one for one in among if one.name == found.choice.name), None)
    report = _search_report(recipe, config, found, folder, out if chosen else None)
    if chosen is not None:
        _write_chosen(resolved, chosen, report, out)
    _keep(report, folder)
    return report


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
        marks = pareto_marks(rung)
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
                pareto=marks[one.name],
            )
            for one in rung
        ]
    sizes = {
        task: [score.parameters for score in found.scores if score.job.task == task]
        for task in TASKS
    }
    length = min(proxy.language.context_len, recipe.train.context_len)
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
            "language tokens per step": proxy.language.batch_size * length,
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


def layer_importance(
    place: RunPlace, *, window: int, told: Callable[[str, int, int], None] | None
) -> ImportanceReport:
    """See `valkyrie_core.runs.allocate_importance`."""
    began = time.perf_counter()
    model, tokenizer, recipe, checkpoint = load_run(place.path)
    dataset = prepare(recipe.data, tokenizer=tokenizer, progress=tell_now_and_then())
    text = text_windows(dataset, recipe.train.longest_context)
    found = measure(model, text, window=window, told=told)
    names, blocks = recipe.model.core.layers, recipe.model.core.blocks
    by_window = sorted((x for x in found if x.change == "windowed"), key=lambda x: x.kl)
    windows, context_len = text.tokens_WT.shape
    return ImportanceReport(
        run=place.name,
        step=checkpoint.step,
        window=window,
        context_len=context_len,
        windows=windows,
        tokens=windows * context_len,
        layers=[
            LayerImportance(
                block=names[one.layer],
                mixer=blocks[names[one.layer]].mixer.type,
                **one._asdict(),
            )
            for one in found
        ],
        could_become_recurrent=[one.layer for one in by_window],
        seconds=time.perf_counter() - began,
    )
