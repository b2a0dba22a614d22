"""Successive halving over layouts: many short trainings, then fewer and longer ones.

Rung after rung, the better half goes on with more steps and more seeds (Jamieson and Talwalkar
2016, arXiv 1502.07943). A rung trains anew rather than going on, so that every score belongs to a
whole schedule.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from valkyrie_core.allocate.candidates import Candidate, candidates, designed
from valkyrie_core.allocate.choice import (
    WORST,
    Choice,
    Scored,
    better_half,
    choose,
    pareto_marks,
)
from valkyrie_core.allocate.picture import decode_bytes
from valkyrie_core.allocate.proxy import Job, ProxyConfig, Score, Task, proxy_model
from valkyrie_core.config import Config
from valkyrie_core.errors import UsageError
from valkyrie_core.plan.flops import training_flops
from valkyrie_core.plan.parameters import weightless
from valkyrie_core.recipe import Recipe

log = logging.getLogger("valkyrie")

DECODE_CONTEXT = 16_384
"""Tokens before the one whose decoding is counted."""
TASKS: tuple[Task, ...] = ("language", "recall")


class Rung(Config):
    """One round."""

    share: float = Field(gt=0, le=1)
    """Of the last round's steps."""
    seeds: int = Field(ge=1)
    """Trainings of each task, seeds 0, 1, ..."""


class SearchConfig(Config):
    """Everything that a search's result depends on, beside the recipe."""

    proxy: ProxyConfig = ProxyConfig()
    rungs: tuple[Rung, ...] = (
        # no shorter: what has not begun to recall can't be told from what never will
        Rung(share=2 / 3, seeds=1),
        Rung(share=0.8, seeds=2),
        Rung(share=1.0, seeds=3),
    )

    def folder_name(self, recipe: Recipe) -> str:
        """A name that another recipe, or another search of it, does not have."""
        content = f"{recipe.fingerprint()}|{self.model_dump_json()}"
        return f"{recipe.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


class Cost(NamedTuple):
    """What a candidate costs at the recipe's width, by formula."""

    decode_bytes: int
    training_flops: int


class Found(NamedTuple):
    """What a search found."""

    scored: list[tuple[int, Scored]]
    """Every candidate at the last rung that it reached (from 1), the last rung's first."""
    unbeaten: frozenset[tuple[int, str]]
    """(rung, candidate) of those that no other one of that rung dominates, gone on or not."""
    choice: Choice
    scores: list[Score]
    """Of all trainings."""


Train = Callable[[Sequence[Job]], list[Score]]
"""Trains jobs, or finds that they were; see `jobs.complete`."""


def costs(recipe: Recipe, among: Sequence[Candidate]) -> dict[str, Cost]:
    """The costs of candidates, built without weights."""
    found = {}
    for candidate in among:
        model = weightless(designed(recipe.model, candidate))
        flops = sum(training_flops(model, recipe.train.context_len).values())
        found[candidate.name] = Cost(decode_bytes(model, DECODE_CONTEXT), flops)
    return found


def search(recipe: Recipe, config: SearchConfig, train: Train) -> Found:
    """Trains rung by rung and chooses; the same for the same recipe and configuration."""
    among = feasible(recipe, config)
    price = costs(recipe, among)
    reached: dict[str, tuple[int, Scored]] = {}
    every: list[Score] = []
    unbeaten: set[tuple[int, str]] = set()
    for number, rung in enumerate(config.rungs, 1):
        scores = train(rung_jobs(among, number, rung, config.proxy))
        every += scores
        scored = [_scored(one, scores, price[one.name]) for one in among]
        reached |= {one.name: (number, one) for one in scored}
        unbeaten |= {(number, name) for name, mark in pareto_marks(scored).items() if mark}
        if number < len(config.rungs):
            going = better_half(scored)
            among = [one for one in among if one.name in going]
    last = [one for number, one in reached.values() if number == len(config.rungs)]
    # a stable sort: candidates of a rung keep their order
    ordered = sorted(reached.values(), key=lambda pair: -pair[0])
    mqar = config.proxy.recall.mqar
    guessing = sum(1 / pairs for pairs in mqar.pairs) / len(mqar.pairs)
    return Found(ordered, frozenset(unbeaten), choose(last, guessing), every)


def feasible(recipe: Recipe, config: SearchConfig) -> list[Candidate]:
    """The candidates that can be made as large as the recipe, at its width and as proxies.

    Raises UsageError where fewer than two can.
    """
    found = []
    for one in candidates(recipe.model):
        jobs = rung_jobs([one], 1, config.rungs[0], config.proxy)
        try:
            designed(recipe.model, one)
            for job in jobs:
                proxy_model(recipe, job, config.proxy)
        except UsageError as error:
            log.warning("%s is left out: %s", one.name, error.message)
        else:
            found.append(one)
    if len(found) < 2:
        raise UsageError(
            "there is nothing to compare: other layouts can't have as many parameters",
            hint="the ffns are too small to be resized; give them a larger hidden_dim",
        )
    return found


def rung_jobs(among: Sequence[Candidate], number: int, rung: Rung, proxy: ProxyConfig) -> list[Job]:
    """The trainings of one rung."""
    full = {"language": proxy.language.steps, "recall": proxy.recall.steps}
    return [
        Job(
            candidate=one.name,
            layers=one.layers,
            window=one.window,
            task=task,
            rung=number,
            seed=seed,
            steps=max(1, round(rung.share * full[task])),
        )
        for seed in range(rung.seeds)
        for one in among
        for task in TASKS
    ]


def expected_steps(among: int, baselines: int, config: SearchConfig, first_rung: int) -> int:
    """An estimate of all steps from a rung (from 1) on; how many go on later is guessed."""
    steps, count = 0.0, among
    for rung in config.rungs[first_rung - 1 :]:
        full = config.proxy.language.steps + config.proxy.recall.steps
        steps += count * rung.seeds * rung.share * full
        count = min(count, -(-count // 2) + baselines)
    return round(steps)


def _scored(candidate: Candidate, scores: Sequence[Score], cost: Cost) -> Scored:
    own = sorted(
        (score for score in scores if score.job.candidate == candidate.name),
        key=lambda score: score.job.seed,
    )
    bpb = [score.bpb for score in own if score.job.task == "language"]
    recall = [score.recall for score in own if score.job.task == "recall"]
    return Scored(
        candidate.name,
        candidate.is_baseline,
        tuple(WORST if value is None else value for value in bpb),
        tuple(sum(shares.values()) / len(shares) for shares in recall),
        *cost,
    )


def by_pairs(name: str, rung: int, scores: Sequence[Score]) -> dict[int, float]:
    """A candidate's recall at a rung by number of pairs, mean over seeds."""
    own = [s.recall for s in scores if s.job.candidate == name and s.job.rung == rung and s.recall]
    return {pairs: sum(shares[pairs] for shares in own) / len(own) for pairs in own[0]}


def default_folder(recipe: Recipe, config: SearchConfig) -> Path:
    """Where a search keeps its results: beside the runs, never in one."""
    return Path(recipe.runs_dir) / "allocate" / config.folder_name(recipe)


def search_config(
    *,
    steps: int | None = None,
    recall_steps: int | None = None,
    width: int | None = None,
    seeds: int | None = None,
) -> SearchConfig:
    """The usual search with some of its sizes changed; None leaves one as it is.

    Args:
        steps, recall_steps: of the last rung.
        width: channels of the language proxies.
        seeds: of the last rung; earlier ones have no more.
    """
    usual = SearchConfig()
    language = {"steps": steps, "width": width}
    proxy = ProxyConfig(
        language=usual.proxy.language.model_copy(
            update={name: value for name, value in language.items() if value is not None}
        ),
        recall=usual.proxy.recall.model_copy(
            update={} if recall_steps is None else {"steps": recall_steps}
        ),
    )
    if seeds is None:
        return SearchConfig(proxy=proxy)
    rungs = [rung.model_copy(update={"seeds": min(rung.seeds, seeds)}) for rung in usual.rungs]
    rungs[-1] = rungs[-1].model_copy(update={"seeds": seeds})
    return SearchConfig(proxy=proxy, rungs=tuple(rungs))
