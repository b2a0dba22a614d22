"""A folder of finished trainings, and the processes that fill it.

Every result is one JSON file, written whole or not at all: what is there is never computed again,
and whatever ends the program costs the trainings that were under way, no more. The processes have
one thread each, so that a result does not depend on how many there are.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from valkyrie_core.allocate.proxy import Job, ProxyConfig, Score, run
from valkyrie_core.data.dataset import Dataset, prepare
from valkyrie_core.errors import ResourceError, ValkyrieError
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

PATIENCE = 0.2
"""Seconds between two looks at whether a stop was asked for."""
EXPECTED = "!"
"""Begins the answer of a process that a file or its memory failed; no bug of ours."""
Poll = Callable[[], None]
Done = Callable[[Score], None]


class Work(NamedTuple):
    """What every process is given before its first job, as text."""

    recipe: str
    config: str


def kept(folder: Path, job: Job) -> Score | None:
    """The result of a job that was done before; None where there is none that can be read."""
    path = folder / job.file
    try:
        score = Score.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("%s can't be read and is made again: %s", path, str(error).splitlines()[0])
        return None
    # another number of steps is another training
    return score if score.job == job else None


def complete(
    jobs: Sequence[Job],
    folder: Path,
    recipe: Recipe,
    config: ProxyConfig,
    *,
    processes: int,
    poll: Poll,
    done: Done,
) -> list[Score]:
    """The results of all jobs, in their order; what the folder lacks is trained now.

    Args:
        processes: how many train at once, with one thread each.
        poll: called all the time; what it raises ends the processes.
        done: told about every result that is new.

    Raises ResourceError where a process was ended from outside.
    """
    scores = {job.file: score for job in jobs if (score := kept(folder, job)) is not None}
    missing = [job for job in jobs if job.file not in scores]
    storage = Storage()
    if missing:
        work = Work(recipe.to_json(), config.model_dump_json())
        for score in _train(missing, work, min(processes, len(missing)), poll):
            try:
                storage.replace_json(folder / score.job.file, score.model_dump(mode="json"))
            except OSError as error:
                raise ResourceError(
                    f"{folder / score.job.file} can't be written: {error.strerror}"
                ) from error
            scores[score.job.file] = score
            done(score)
    return [scores[job.file] for job in jobs]


def _train(jobs: Sequence[Job], work: Work, processes: int, poll: Poll) -> Iterator[Score]:
    """The results of jobs, as they come; no process outlives this generator."""
    waiting = list(reversed(jobs))
    with _processes(processes, work) as connections:
        busy: dict[Connection, Job] = {}
        while waiting or busy:
            for connection in connections:
                if waiting and connection not in busy:
                    busy[connection] = waiting.pop()
                    connection.send_bytes(busy[connection].model_dump_json().encode())
            for ready in wait(list(busy), timeout=PATIENCE):
                assert isinstance(ready, Connection)
                job = busy.pop(ready)
                try:
                    answer = ready.recv_bytes().decode()
                except EOFError:
                    raise ResourceError(
                        f"the process that trained {job.file} was ended: memory may have run out",
                        hint="the same command goes on; --processes 1 needs less memory",
                    ) from None
                if answer.startswith(EXPECTED):
                    raise ResourceError(f"{job.file}: {answer.removeprefix(EXPECTED)}")
                if not answer.startswith("{"):
                    raise RuntimeError(f"{job.file}: {answer}")
                yield Score.model_validate_json(answer)
            poll()


@contextmanager
def _processes(count: int, work: Work) -> Iterator[list[Connection]]:
    """So many fresh processes that train what they are sent; ended on the way out."""
    # fresh ones: a fork would copy torch's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    started: list[BaseProcess] = []
    try:
        with _one_thread(), _without_interrupts():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(
                    target=_serve, args=(theirs, *work), daemon=True
                )
                process.start()
                theirs.close()
                connections.append(ours)
                started.append(process)
        yield connections
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()
        for connection in connections:
            connection.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start in here never see Ctrl-C, which goes to the whole group: the parent
    decides, and ends them. Here it waits until they have started."""
    # the tracker that the first start would begin lets interrupts in again
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that start in here compute with one thread from their first import on."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection: Connection, recipe_json: str, config_json: str) -> None:
    """What a process does: trains one job after another until nobody asks any more."""
    # blocked since before the start: the parent ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = os.getppid()

    def poll() -> None:
        if os.getppid() != parent:
            # the parent was killed: nobody waits for this any more
            os._exit(1)

    recipe = Recipe.model_validate_json(recipe_json)
    config = ProxyConfig.model_validate_json(config_json)
    opened: list[Dataset] = []

    def dataset() -> Dataset:
        if not opened:
            opened.append(prepare(recipe.data))
        return opened[0]

    while True:
        try:
            job = Job.model_validate_json(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = run(recipe, config, job, dataset=dataset, poll=poll).model_dump_json()
        except ValkyrieError as error:
            answer = EXPECTED + error.message
        except Exception:
            answer = traceback.format_exc()
        connection.send_bytes(answer.encode())


class Pace:
    """How long the rest takes, from what was done in this sitting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._ahead, self._made = 0.0, 0.0

    def ahead(self, steps: float) -> None:
        """So many are to be made from now on."""
        self._ahead = steps

    def made(self, steps: float) -> None:
        """So many were made now."""
        self._made += steps
        self._ahead -= steps

    @property
    def eta_seconds(self) -> float | None:
        """Seconds that the rest takes at this pace; None before anything was done."""
        if not self._made:
            return None
        return (self._clock() - self._began) * max(0.0, self._ahead) / self._made
