"""A study as a queue of trainings: every one a process of one thread, so many at a time.

What a study lacks is told by its files, so that a queue which was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import result
from valkyrie_core.errors import StoppedError, ValkyrieError

log = logging.getLogger("valkyrie")


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


class Study(NamedTuple):
    """Arms with some seeds each, and what to do with one of them."""

    module: str
    about: str
    arms: Collection[str]
    seeds: tuple[int, ...]
    file_of: Callable[[str, int], Path]
    """The result of an arm and a seed; there if it is done."""
    train: Callable[[str, int, Path], None]
    """Trains one, into a folder of runs, and writes its result."""
    prepare: Callable[[Path], None]
    """Once, before the first training."""
    write_page: Callable[[], None]


def run_study(study: Study, arguments: list[str] | None = None) -> int:
    """The program of a study: trains what is missing, then writes the page; an exit code."""
    again = f"python -m {study.module}"
    parser = argparse.ArgumentParser(prog=again, description=study.about)
    parser.add_argument("--tables", action="store_true", help="train nothing, write the page")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--arms", nargs="+", choices=study.arms, default=list(study.arms))
    parser.add_argument("--seeds", type=int, nargs="+", default=study.seeds)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="this training, here")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        if options.one:
            study.train(options.one[0], int(options.one[1]), options.runs_dir)
            return 0
        if not options.tables:
            study.prepare(options.runs_dir)
            # one seed after the other, so that an interrupted study has whole seeds
            jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
            left = [job for job in jobs if not study.file_of(*job).exists()]
            processes, runs_dir = options.processes, options.runs_dir
            run_jobs(study.module, left, processes=processes, runs_dir=runs_dir)
        study.write_page()
    except KeyboardInterrupt:
        log.warning("stopped; go on with: %s", again)
        return 130
    except ValkyrieError as error:
        log.error("%s; go on with: %s", error, again)
        return error.exit_code
    return 0
