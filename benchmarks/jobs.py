"""A study as a queue of trainings: every one a process of one thread, so many at a time.

What a study lacks is told by its files, so that a queue which was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import result, tables
from valkyrie_core import Recipe
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import StoppedError, ValkyrieError
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

Found = Mapping[str, Any]
"""The result of one training: `arm`, `seed`, `origin`, and what the study wants to know."""


class Study(NamedTuple):
    """Arms of one recipe, with some seeds each; `benchmarks.<name>` is its program."""

    name: str
    """Also of the folder of its results, and where the names of its runs begin."""
    about: str
    recipe: str
    arms: Collection[str]
    overrides: Callable[[str], Sequence[str]]
    """What an arm changes of the recipe."""
    train: Callable[[str, Recipe], Found]
    """Trains an arm, or goes on with it, and says what it found."""
    page: str
    """Of the documentation."""
    tables: Callable[[Sequence[Found]], Mapping[str, str]]
    """What stands between the page's markers, made of all results that are there."""
    seeds: tuple[int, ...] = (0, 1, 2)
    measure: Callable[[Study, Path], None] | None = None
    """Once, before the first training."""
    results: Path = result.RESULTS

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.results / self.name

    def file_of(self, arm: str, seed: int) -> Path:
        """The result of one training; there if it is done."""
        return self.folder / f"{arm}-{seed}.json"

    def recipe_of(self, arm: str, seed: int, runs_dir: Path) -> Recipe:
        """The recipe of one training."""
        own = [f"name={self.name}-{arm}-{seed}", f"seed={seed}", f"runs_dir={runs_dir}"]
        return Recipe.load(self.recipe, [*own, *self.overrides(arm)])

    def run_one(self, arm: str, seed: int, runs_dir: Path) -> None:
        """Trains an arm on one thread, and writes its result."""
        torch.set_num_threads(1)
        found = self.train(arm, self.recipe_of(arm, seed, runs_dir))
        origin = result.origin()._asdict()
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"arm": arm, "seed": seed, "origin": origin, **found}
        Storage().replace_json(self.file_of(arm, seed), content)

    def found(self) -> list[Found]:
        """The results that are there, arm by arm."""
        paths = [self.file_of(arm, seed) for arm in self.arms for seed in self.seeds]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]

    def write_page(self) -> None:
        """Raises ValkyrieError if nothing was measured yet."""
        found = self.found()
        if not found:
            hint = f"python -m benchmarks.{self.name}"
            raise ValkyrieError("there is no result yet", hint=hint)
        path = result.ROOT / "docs" / self.page
        text = path.read_text(encoding="utf-8")
        for name, body in self.tables(found).items():
            text = tables.put(text, name, body)
        path.write_text(text, encoding="utf-8")


def where(found: Sequence[Found]) -> str:
    """The machine and the day of results."""
    origin = found[0]["origin"]
    return f"{origin['processor']}, {origin['date']}"


def run_jobs(
    module: str, jobs: Sequence[tuple[str, int]], *, processes: int, runs_dir: Path
) -> None:
    """Runs `python -m module --one ARM SEED --runs-dir DIR` for every job; Ctrl-C reaches them all.

    Raises:
        StoppedError: one of them ended with an error.
    """
    waiting = list(jobs)
    busy: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    while waiting or busy:
        while waiting and len(busy) < processes:
            arm, seed = waiting.pop(0)
            command = [sys.executable, "-m", module, "--one", arm, str(seed)]
            command += ["--runs-dir", str(runs_dir)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            busy[arm, seed] = subprocess.Popen(
                command, env=environment, cwd=result.ROOT, stderr=subprocess.DEVNULL
            )
        for job, process in list(busy.items()):
            if process.poll() is None:
                continue
            del busy[job]
            if process.returncode:
                raise StoppedError(f"{job[0]}, seed {job[1]} ended with {process.returncode}")
            log.info("%s, seed %d is done; %d left", *job, len(waiting) + len(busy))
        time.sleep(0.5)


def run_study(study: Study, arguments: list[str] | None = None) -> int:
    """The program of a study: trains what is missing, then writes the page; an exit code."""
    module = f"benchmarks.{study.name}"
    again = f"python -m {module}"
    parser = argparse.ArgumentParser(prog=again, description=study.about)
    parser.add_argument("--tables", action="store_true", help="train nothing, write the page")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--arms", nargs="+", choices=list(study.arms), default=list(study.arms))
    parser.add_argument("--seeds", type=int, nargs="+", default=study.seeds)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="this training, here")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        if options.one:
            study.run_one(options.one[0], int(options.one[1]), options.runs_dir)
            return 0
        if not options.tables:
            prepare(Recipe.load(study.recipe).data)
            if study.measure is not None:
                study.measure(study, options.runs_dir)
            # one seed after the other, so that an interrupted study has whole seeds
            jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
            left = [job for job in jobs if not study.file_of(*job).exists()]
            processes, runs_dir = options.processes, options.runs_dir
            run_jobs(module, left, processes=processes, runs_dir=runs_dir)
        study.write_page()
    except KeyboardInterrupt:
        log.warning("stopped; go on with: %s", again)
        return 130
    except ValkyrieError as error:
        log.error("%s; go on with: %s", error, again)
        return error.exit_code
    return 0
