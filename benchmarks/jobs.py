"""A queue of trainings: every one a process of one thread, so many at a time.

What a study lacks is told by its files, so that a queue which was stopped goes on where it was.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import result
from valkyrie_core.errors import StoppedError

log = logging.getLogger("valkyrie")


def run_jobs(
    module: str, jobs: Sequence[tuple[str, int]], *, processes: int, runs_dir: Path
) -> None:
    """Runs `python -m module --one ARM SEED --runs-dir DIR` for every job; Ctrl-C reaches them all.

    Raises:
        StoppedError: one of them ended with an error.
    """
    waiting, busy = list(jobs), {}
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
