"""Everything that can be done with a run: train, evaluate, generate, chat, list.

The command line calls nothing else, and neither need you:

    from valkyrie_core import Recipe, runs
    report = runs.train(Recipe.load("quickstart"))
    model, tokenizer, recipe = runs.load(report.directory)

This module is the only one that knows all parts. It imports them where they are used: listing
runs answers at once, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from valkyrie_core.errors import UsageError
from valkyrie_core.inventory import RunPlace, find_run, is_transcript, list_runs, show_run
from valkyrie_core.paths import typed_path
from valkyrie_core.report import (
    AllocateReport,
    CalibrateReport,
    CompareReport,
    DoctorReport,
    EvalReport,
    ExpertsReport,
    ImportanceReport,
    KVFormat,
    LongContextReport,
    PlanReport,
    ReadReport,
    RecurrentFormat,
    RoutesReport,
    SearchReport,
    TokenizerBuildReport,
    TokenizerEvalReport,
    TrainReport,
    Weights,
)
from valkyrie_core.runs.talk import OpenedChat, chat_report, generate, open_chat, sampling

if TYPE_CHECKING:
    from valkyrie_core.allocate.proxy import Score as Score
    from valkyrie_core.allocate.search import SearchConfig
    from valkyrie_core.compare.matching import Match
    from valkyrie_core.data.tokenizer import Tokenizer
    from valkyrie_core.nn.models import Model
    from valkyrie_core.recipe import Recipe, Resolved
    from valkyrie_core.runs.comparison_trials import Begin, Reading
    from valkyrie_core.runs.search import Told
    from valkyrie_core.train.progress import StepEvent as StepEvent

__all__ = [
    "Loaded",
    "OpenedChat",
    "RunPlace",
    "allocate",
    "allocate_importance",
    "allocate_search",
    "build_tokenizer",
    "chat_report",
    "compare",
    "doctor",
    "evaluate",
    "evaluate_long_context",
    "evaluate_tokenizer",
    "experts",
    "find_run",
    "generate",
    "is_transcript",
    "list_runs",
    "load",
    "open_chat",
    "plan",
    "read",
    "sampling",
    "search_config",
    "show_run",
    "train",
    "typed_path",
]


class Loaded(NamedTuple):
    """A trained model with what it takes to use it."""

    model: Model
    tokenizer: Tokenizer
    recipe: Recipe


def load(run: str | Path | None = None, *, runs_dir: str | Path = "runs") -> Loaded:
    """The model of a run (its best checkpoint), ready to evaluate; None: the newest run.

    Raises:
        MissingError: there is no such run, or it has no checkpoint.
        CheckpointError: no checkpoint is valid.
    """
    from valkyrie_core.train.load import load_run

    loaded = load_run(find_run(run, runs_dir).path)
    return Loaded(loaded.model, loaded.tokenizer, loaded.recipe)


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    steps: int | None = None,
    extend_steps: int | None = None,
    progress: Callable[[StepEvent], None] = lambda _event: None,
    resume_command: str | None = None,
) -> TrainReport:
    """Trains what a recipe says, in runs_dir/name; also writes report.json there.

    Args:
        resume: go on from the newest valid checkpoint; a finished run is left as it is.
        steps: fresh, the total and the schedule's horizon; on resume, where to stop earlier.
        extend_steps: continue a finished run by so many steps.
        progress: told about every step and validation.
        resume_command: what goes on with this run; part of messages.

    Raises:
        ValkyrieError: see `valkyrie_core.train.session.train_run`.
    """
    from valkyrie_core.runs.training import train_recipe

    return train_recipe(
        recipe,
        resume=resume,
        steps=steps,
        extend_steps=extend_steps,
        progress=progress,
        resume_command=resume_command or f"valkyrie train {recipe.name} --resume",
    )


def compare(
    designs: Sequence[str],
    *,
    seeds: int = 3,
    steps: int | None = None,
    share: float = 1.0,
    match: Match = "tokens",
    runs_dir: str | Path = "runs",
    out: str | Path | None = None,
    resume: bool = False,
    vary: Sequence[str] = (),
    budget: str | float | None = None,
    begin: Begin = lambda _name, _number, _count, _eta: lambda _event: None,
    reading: Reading | None = None,
    resume_command: str | None = None,
) -> CompareReport:
    """Trains designs on one text, in one order, and says which is better and how sure that is.

    Trainings lie in `runs_dir/compare`, a design and seed each; what is finished there, or in a run
    of the recipe's own name, is not trained again. The comparison is written into `out`.

    Args:
        designs: names or files of recipes, or runs; the first one is what others are set against.
        seeds: trainings of each, from the seed of its recipe on.
        steps: of the first design; None: its recipe's, of which `share` is trained.
        match: what trainings have in common: tokens, parameters and tokens (ffns are resized),
            training FLOPs or seconds (the others train more or fewer steps).
        out: a folder; None: results/A_vs_B.
        resume: only go on with a comparison that was begun.
        vary: `KEY=V1,V2` for one recipe: its values of a key are compared, or a grid of several.
        budget: seconds of all trainings together, or "20m"; what does not fit is dropped by short
            trainings first (successive halving), but never the first design.
        begin: called before every training.
        reading: told how far a model has read what it is scored on.

    Raises:
        UsageError: designs that can't be compared.
        RecipeError, MissingError: a design that is wrong, or not there.
        StoppedError: a signal came; the same command goes on.
        RunInUseError: another process compares into the same folder.
        DivergedError: a training diverged.
    """
    from valkyrie_core.runs.comparison import compare_designs

    return compare_designs(
        designs,
        seeds=seeds,
        steps=steps,
        share=share,
        match=match,
        runs_dir=str(runs_dir),
        out=None if out is None else typed_path(out),
        resume=resume,
        begin=begin,
        reading=reading,
        command=resume_command or f"valkyrie compare {' '.join(designs)}",
        vary=vary,
        budget=budget,
    )


def plan(
    recipe: Recipe,
    *,
    memory: str | int | None = None,
    progress: Callable[[str], None] | None = None,
) -> PlanReport:
    """What a recipe costs, before anything is built: parameters, FLOPs, bytes, seconds.

    Args:
        memory: what training may take, in bytes or as "24GiB"; left out, what is free here.
        progress: told what is being looked at.

    Raises:
        UsageError: `memory` is no amount of memory.
        MissingError: the recipe's device is not there.
    """
    from valkyrie_core.runs.planning import plan_recipe

    return plan_recipe(recipe, memory=memory, progress=progress)


def evaluate(
    run: str | Path | None = None,
    *,
    runs_dir: str | Path = "runs",
    context: Literal["window", "carried"] = "window",
    weights: Weights = "fp32",
    halt: str | None = None,
    min_depth: int | None = None,
    max_depth: int | None = None,
    memory: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvalReport:
    """Bits per byte on every validation corpus of a run's recipe, with baselines.

    Of a model with loops or steps also what every depth scores, and what ending early saves.

    Args:
        context: what a token is predicted from; see `valkyrie_core.evaluate.bits.Context`.
        halt: what ends thought early, such as kl=0.001, argmax=2, latent=0.03, confidence=0.9 or
            q_halt; `none`; `calibrated`. Left out: what `calibrate` kept, else the recipe's rule.
        min_depth, max_depth: loops or steps, at least and at most.
        memory: of a canvas: the questions are also asked one after the other with a memory of
            verified answers, which looks at questions whose states have at least this cosine.
        weights: the format of the matrices. For any but fp32 the weights as trained are scored as
            well, and the report says what the format costs.
        progress: called with the corpus, the positions read, and their total.

    Raises:
        MissingError: there is no such run, or its texts are gone.
        CheckpointError: no checkpoint is valid, or the texts are not those of the training.
    """
    from valkyrie_core.runs.evaluation import evaluate_run

    return evaluate_run(
        find_run(run, runs_dir),
        context=context,
        weights=weights,
        progress=progress,
        halt=halt,
        min_depth=min_depth,
        max_depth=max_depth,
        memory=memory,
    )


def calibrate(
    run: str | Path | None = None,
    *,
    runs_dir: str | Path = "runs",
    risk: float = 0.02,
    delta: float = 0.05,
    seed: int = 0,
    save: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> CalibrateReport:
    """Chooses from which confidence on thought may end, with a guarantee, and keeps it in the run.

    Half of the held-out questions (of text: documents) choose, the other half tests.

    Args:
        risk: how often ending early may make a right answer wrong; of text, the share of a
            document's tokens that may be others.
        delta: the chance that is taken of more than that.
        seed: of the halves.
        save: keeps the threshold, which `evaluate` then goes by.
        progress: called with what is read, how much of it, and the total.

    Raises:
        UsageError: the run has learned no confidence, or risk or delta is no share.
        MissingError: there is no such run, or its texts are gone.
        CheckpointError: no checkpoint is valid, or the texts are not those of the training.
    """
    from valkyrie_core.runs.calibration import calibrate_run

    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise UsageError(f"{name} is a share between 0 and 1, not {value:g}")
    place = find_run(run, runs_dir)
    return calibrate_run(place, risk=risk, delta=delta, seed=seed, save=save, progress=progress)


def evaluate_long_context(
    run: str | Path | None = None,
    context: int = 16_384,
    *,
    runs_dir: str | Path = "runs",
    chunk: int | None = None,
    text: str | Path | None = None,
    weights: Weights = "fp32",
    kv_window: int | None = None,
    kv_dtype: KVFormat = "computed",
    state_dtype: RecurrentFormat = "computed",
    yarn: float | None = None,
    recall: bool = True,
    save: bool = True,
    page: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> LongContextReport:
    """How a run reads a long text: losses by position and context, speed and memory by length.

    Args:
        context: tokens that are read from the beginning, and the longest context that is compared.
        chunk: tokens that are read at once, 1024 if left out. Changes memory and speed, and not
            the losses, unless the state is rounded: that happens after every chunk, and 128 is
            what it is then if left out.
        text: a file to read; left out, the run's longest validation document, or the Python
            documentation where that is too short.
        kv_window, kv_dtype, state_dtype: how the state is kept; see `nn.state_format.StateFormat`.
        yarn: stretches rotary positions by this factor. With any of these four the model is read
            as it was trained as well, and the report says what they cost.
        recall: asks for facts in the text; most of the time that all of this takes.
        save: writes `long_context.json` and `long_context.png` into the run's directory.
        page: with `save`, writes `long_context.md` as well: all tables, to be passed on.
        progress: called with what is read, the tokens read so far, and their total.

    Raises:
        MissingError: there is no such run or text.
        UsageError: the context is too short, or longer than the text.
        CheckpointError: no checkpoint is valid.
    """
    from valkyrie_core.nn.state_format import StateFormat
    from valkyrie_core.runs.long_context import read_long

    if kv_window is not None and kv_window < 1:
        raise UsageError(f"a window has at least 1 token, not {kv_window}")
    if yarn is not None and not 1 <= yarn < math.inf:
        raise UsageError(f"YaRN stretches by a finite factor of at least 1, not {yarn}")

    return read_long(
        find_run(run, runs_dir),
        context,
        chunk=chunk,
        text=None if text is None else typed_path(text),
        weights=weights,
        kept=StateFormat(kv_window=kv_window, kv_dtype=kv_dtype, state_dtype=state_dtype),
        yarn=yarn,
        recall=recall,
        save=save,
        page=page,
        told=progress,
    )


def read(
    run: str | Path | None,
    text: str | Path,
    save_state: str | Path,
    *,
    state: str | Path | None = None,
    weights: Weights = "fp32",
    chunk: int = 1024,
    runs_dir: str | Path = "runs",
    progress: Callable[[str, int, int], None] | None = None,
) -> ReadReport:
    """Reads a text and keeps the state after it in a file.

    Args:
        text: a UTF-8 file.
        save_state: where the state goes; a state that is there is replaced.
        state: a state file to begin with; left out, the text begins a document.
        weights: the format of the matrices.
        chunk: tokens that are read at once.
        progress: called with the text, the tokens read, and their total.

    Raises:
        MissingError: there is no such run, text, state or folder.
        UsageError: the text is empty or not UTF-8, or a file is no state of this model.
        CheckpointError: no checkpoint is valid.
    """
    from valkyrie_core.runs.reading import read_text

    return read_text(
        find_run(run, runs_dir),
        typed_path(text),
        typed_path(save_state),
        state=None if state is None else typed_path(state),
        weights=weights,
        chunk=chunk,
        told=progress,
    )


def doctor(
    runs_dir: str | Path = "runs", *, progress: Callable[[str], None] | None = None
) -> DoctorReport:
    """Looks over this machine; `progress` is told what is looked at."""
    from valkyrie_core.runs.machine import examine_machine

    return examine_machine(Path(runs_dir), progress)


def build_tokenizer(recipe: Recipe, directory: str | Path) -> TokenizerBuildReport:
    """Trains a recipe's tokenizer, for the cache and for a directory."""
    from valkyrie_core.runs.tokenizers import build

    return build(recipe, Path(directory))


def evaluate_tokenizer(recipe: Recipe) -> TokenizerEvalReport:
    """What a recipe's tokenizer does to its texts and to hostile ones, and what it costs."""
    from valkyrie_core.runs.tokenizers import score

    return score(recipe)


def allocate(
    resolved: Resolved,
    *,
    ratio: str | None = None,
    pattern: str | None = None,
    preset: str | None = None,
    match: Literal["params", "flops"] | None = None,
    out: str | Path | None = None,
) -> AllocateReport:
    """The stack of a recipe, and what it becomes with its layers rearranged; trains nothing.

    Args:
        resolved: the recipe and its text, from `valkyrie_core.recipe.resolve`.
        ratio: recurrent:attention, such as `3:1`.
        pattern: letters and names of blocks, such as `R R R A`.
        preset: one of `valkyrie_core.allocate.layout.PRESETS`.
        match: keep parameters or training FLOPs per token by resizing the ffns.
        out: a new recipe file with the design; never overwritten.

    Raises:
        UsageError: the design is nonsense, can't be matched, or the file exists.
    """
    from valkyrie_core.runs.allocation import show_or_design

    return show_or_design(
        resolved,
        ratio=ratio,
        pattern=pattern,
        preset=preset,
        match=match,
        out=None if out is None else typed_path(out),
    )


def allocate_search(
    resolved: Resolved,
    config: SearchConfig | None = None,
    *,
    out: str | Path | None = None,
    processes: int = 2,
    told: Told = lambda _score, _done, _eta: None,
    resume_command: str | None = None,
) -> SearchReport:
    """Scores layouts by short trainings of small models and writes the recipe of the best one.

    Results lie in `runs_dir/allocate/NAME-HASH`, one file a training: what is there is not trained
    again, and another recipe or configuration has another folder.

    Args:
        resolved: the recipe and its text, from `valkyrie_core.recipe.resolve`.
        config: budgets and rungs; None: the usual ones.
        out: the recipe to write; None: recipes/NAME-allocated.yaml in the current folder.
        processes: trainings at a time, one thread each; changes no result.
        told: called after every training.

    Raises:
        UsageError: the file to write exists.
        StoppedError: a signal came; the finished trainings are kept.
        RunInUseError: another process searches in the same folder.
    """
    from valkyrie_core.allocate.search import SearchConfig
    from valkyrie_core.runs.search import search_layouts

    name = resolved.recipe.name
    return search_layouts(
        resolved,
        config or SearchConfig(),
        out=typed_path(out or Path("recipes", f"{name}-allocated.yaml")),
        processes=processes,
        told=told,
        resume_command=resume_command or f"valkyrie allocate {name} --search",
    )


def search_config(
    *,
    steps: int | None = None,
    recall_steps: int | None = None,
    width: int | None = None,
    seeds: int | None = None,
) -> SearchConfig:
    """The usual search with some of its sizes changed; None leaves one as it is.

    Args:
        steps, recall_steps: of the longest trainings on text and on MQAR.
        width: channels of the models that learn text.
        seeds: of the last rung.
    """
    from valkyrie_core.allocate.search import search_config

    return search_config(steps=steps, recall_steps=recall_steps, width=width, seeds=seeds)


def allocate_importance(
    run: str | Path | None = None,
    *,
    runs_dir: str | Path = "runs",
    window: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> ImportanceReport:
    """Which layers of a run could become recurrent: KL when one of them is windowed or removed.

    Args:
        window: last tokens that windowed attention sees.
        progress: called with what is read, how much of it, and the total.

    Raises:
        MissingError: there is no such run, or its texts are gone.
        CheckpointError: no checkpoint is valid.
        UsageError: the window is no shorter than the context.
    """
    from valkyrie_core.runs.allocation import layer_importance

    return layer_importance(find_run(run, runs_dir), window=window, told=progress)


def experts(
    run: str | Path | None = None,
    *,
    runs_dir: str | Path = "runs",
    step: int | None = None,
    texts: Sequence[str | Path] = (),
    tokens: int | None = None,
    knock_out: bool = True,
    save: bool = True,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExpertsReport:
    """How a run uses its experts: loads, what they choose, and what removing one costs.

    Args:
        step: of the checkpoint; None: the best one.
        texts: files to read, each of them a domain; empty: the run's validation data, where every
            corpus is a domain.
        tokens: read of each domain; None: 16,384.
        knock_out: removes experts one at a time; most of the time that all of this takes.
        save: writes `experts.json`, `experts.html` and pictures into the run's directory.
        seed: of shuffles and bootstraps.
        progress: called with what is read, how much of it, and the total.

    Raises:
        MissingError: there is no such run, step or text, or the run's texts are gone.
        UsageError: the run has no experts, or a text has no tokens.
        CheckpointError: no checkpoint is valid, or the texts are not those of the training.
    """
    from valkyrie_core.runs.utilization import TOKENS, experts_of_run

    if tokens is not None and tokens < 2:
        raise UsageError(f"a domain has at least 2 tokens, not {tokens}")
    return experts_of_run(
        find_run(run, runs_dir),
        step=step,
        texts=[typed_path(text) for text in texts],
        tokens=TOKENS if tokens is None else tokens,
        knock_out=knock_out,
        save=save,
        seed=seed,
        told=progress,
    )


def routes(
    run: str | Path | None = None,
    *,
    runs_dir: str | Path = "runs",
    step: int | None = None,
    text: str | Path | None = None,
    prompt: str | None = None,
    tokens: int | None = None,
    halt: str | None = None,
    save: bool = True,
) -> RoutesReport:
    """Which mixers the tokens of a text go through in a run with routers.

    Args:
        step: of the checkpoint; None: the best one.
        text: a file to read; with neither that nor a prompt: the first held-out document.
        prompt: the text itself.
        tokens: of it, at most; None: 256.
        halt: the confidence from which tokens take the cheapest mixers, such as confidence=0.9;
            `calibrated`; None: none do.
        save: draws `routes.png` into the run's directory.

    Raises:
        MissingError: there is no such run, step or text, or the run's texts are gone.
        UsageError: the run has no routers, the text no tokens, or there are two texts.
        CheckpointError: no checkpoint is valid, or the texts are not those of the training.
    """
    from valkyrie_core.runs.mixer_routes import TOKENS, routes_of_run

    if tokens is not None and tokens < 1:
        raise UsageError(f"a text has at least 1 token, not {tokens}")
    return routes_of_run(
        find_run(run, runs_dir),
        step=step,
        halt=halt,
        text=None if text is None else typed_path(text),
        prompt=prompt,
        tokens=TOKENS if tokens is None else tokens,
        save=save,
    )
