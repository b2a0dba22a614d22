"""The queue of trainings: nothing done twice, nothing lost, nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.allocate.small import PROXY, SEARCH, tiny
from valkyrie_core.allocate.candidates import candidates
from valkyrie_core.allocate.jobs import Pace, complete, kept
from valkyrie_core.allocate.proxy import Job, Score, run
from valkyrie_core.allocate.search import rung_jobs
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import ValkyrieError
from valkyrie_core.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("VALKYRIE_CACHE", str(tmp_path / "cache"))
    made = tiny(tmp_path)
    prepare(made.data)
    return made


@pytest.fixture
def jobs(recipe: Recipe) -> list[Job]:
    return rung_jobs(candidates(recipe.model)[:2], 1, SEARCH.rungs[0], PROXY)


class EnoughError(ValkyrieError):
    """Stops a queue from inside."""


def nothing() -> None:
    """Never stops."""


def test_a_stopped_queue_goes_on_where_it_was(
    recipe: Recipe, jobs: list[Job], tmp_path: Path
) -> None:
    folder = tmp_path / "queue"
    folder.mkdir()
    done: list[Score] = []

    def stop_after_one() -> None:
        if done:
            raise EnoughError("enough")

    with pytest.raises(EnoughError):
        complete(jobs, folder, recipe, PROXY, processes=1, poll=stop_after_one, done=done.append)
    assert len(done) == len(list(folder.glob("*.json"))) == 1
    first = (folder / done[0].job.file).read_bytes()
    rest: list[Score] = []
    scores = complete(jobs, folder, recipe, PROXY, processes=2, poll=nothing, done=rest.append)
    assert [score.job for score in scores] == jobs
    assert len(rest) == len(jobs) - 1
    assert (folder / done[0].job.file).read_bytes() == first
    # all there: nothing is trained, no process started
    again = complete(jobs, folder, recipe, PROXY, processes=2, poll=nothing, done=rest.append)
    assert again == scores
    assert len(rest) == len(jobs) - 1


def test_results_do_not_depend_on_how_many_processes_there_are(
    recipe: Recipe, jobs: list[Job], tmp_path: Path
) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        scores = complete(
            jobs, folder, recipe, PROXY, processes=processes, poll=nothing, done=lambda _score: None
        )
        found.append([score.model_copy(update={"seconds": 0.0}) for score in scores])
    assert found[0] == found[1]
    language = [score for score in found[0] if score.job.task == "language"]
    assert all(score.bpb is not None and 0 < score.bpb < 20 for score in language)
    recall = [score for score in found[0] if score.job.task == "recall"]
    assert all(set(score.recall) == {1, 3} for score in recall)


def test_what_is_damaged_or_of_another_budget_is_made_again(
    recipe: Recipe, jobs: list[Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    score = Score(job=jobs[0], parameters=1, bpb=2.0, seconds=1.0)
    path = tmp_path / jobs[0].file
    path.write_text(score.model_dump_json())
    assert kept(tmp_path, jobs[0]) == score
    assert kept(tmp_path, jobs[0].model_copy(update={"steps": 77})) is None
    path.write_text(path.read_text()[:20])
    assert kept(tmp_path, jobs[0]) is None
    assert kept(tmp_path, jobs[1]) is None


def test_a_bug_in_a_training_is_told(recipe: Recipe, jobs: list[Job], tmp_path: Path) -> None:
    broken = [jobs[0].model_copy(update={"layers": ("R", "nothing")})]
    with pytest.raises(RuntimeError, match="nothing"):
        complete(
            broken, tmp_path, recipe, PROXY, processes=1, poll=nothing, done=lambda _score: None
        )


def test_the_pace_tells_what_is_left() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.ahead(100)
    assert pace.eta_seconds is None
    now[0] = 10.0
    pace.made(20)
    assert pace.eta_seconds == pytest.approx(40)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and ") Z " not in status.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_keeps_what_is_done_and_leaves_nobody(
    recipe: Recipe, tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "small.json"
    recipe.save(file)
    command = [
        *(sys.executable, "-m", "valkyrie_cli", "allocate", str(file), "--search"),
        *("--steps", "2000", "--recall-steps", "1", "--seeds", "1", "--json"),
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    queue = Path(recipe.runs_dir) / "allocate"
    try:
        wait_for(lambda: list(queue.glob("*/*-recall.json")))
        workers = children(process.pid)
        assert workers
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    wait_for(lambda: not any(alive(pid) for pid in workers), 30)
    assert list(queue.glob("*/*-recall.json"))
    if number == signal.SIGINT:
        assert process.returncode == 75, err
        failure = json.loads(out)["error"]
        assert failure["hint"].startswith("go on with: valkyrie allocate")
        assert "--steps 2000" in failure["hint"]


@pytest.mark.skipif(sys.platform != "linux", reason="sends a signal to a group")
def test_ctrl_c_while_processes_start_is_one_clean_stop(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "small.json"
    recipe.save(file)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "valkyrie_cli", "allocate", str(file), "--search"),
            *("--steps", "2000", "--recall-steps", "2000", "--seeds", "1"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(children(process.pid)) >= 2)
        # as a terminal does: to all of them, while they import
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    assert "saving as soon as" not in err


def test_a_proxy_that_diverges_at_its_end_is_a_score(recipe: Recipe, cache: Path) -> None:
    optimizer = {"type": "adamw", "lr": 1e30}
    train = recipe.train.model_validate({**recipe.train.model_dump(), "optimizer": optimizer})
    wild = recipe.model_copy(update={"train": train})
    job = Job(
        candidate="RA", layers=("R", "A"), window=None, task="language", rung=1, seed=0, steps=1
    )
    score = run(wild, PROXY, job, dataset=lambda: prepare(wild.data), poll=lambda: None)
    assert score.bpb is None


def test_a_score_without_its_number_is_made_again(
    recipe: Recipe, jobs: list[Job], tmp_path: Path
) -> None:
    job = next(job for job in jobs if job.task == "recall")
    content = {"job": job.model_dump(mode="json"), "parameters": 1, "recall": {}, "seconds": 1.0}
    (tmp_path / job.file).write_text(json.dumps(content))
    assert kept(tmp_path, job) is None
    content["recall"] = {"1": 0.5}
    (tmp_path / job.file).write_text(json.dumps(content))
    assert kept(tmp_path, job) is not None
