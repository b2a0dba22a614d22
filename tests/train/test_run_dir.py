from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.train import small
from valkyrie_core.errors import MissingError, ResourceError, RunInUseError
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.schedule import Extension

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from valkyrie_core.errors import RunInUseError
from valkyrie_core.train.run_dir import RunDir
run = RunDir(Path({path!r}))
print("ready", flush=True)
sys.stdin.readline()
try:
    with run.lock("valkyrie train holder"):
        print("held", flush=True)
        sys.stdin.readline()
except RunInUseError as error:
    print("refused", error.exit_code, error, flush=True)
"""


@contextmanager
def holders(path: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    code = HOLDER.format(root=str(ROOT), path=str(path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert answer(process) == "ready"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "here")
    run.create()
    return run


def test_two_writers_and_a_killed_one(run: RunDir) -> None:
    with holders(run.path, 2) as (one, two):
        tell(one)
        tell(two)
        answers = [answer(one), answer(two)]
        assert sum(text == "held" for text in answers) == 1
        holder, refused = (one, two) if answers[0] == "held" else (two, one)
        text = answers[0] if refused is one else answers[1]
        assert text.startswith("refused 8")
        # a third one, after the card is surely written, learns who holds it
        with pytest.raises(RunInUseError) as caught, run.lock("third"):
            pass
        assert re.search(rf"process {holder.pid} on .+ since 20", str(caught.value))
        assert "valkyrie train holder" in str(caught.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run.lock("third"):
            owner = json.loads((run.path / "lock.json").read_bytes())
            assert owner["pid"] == os.getpid()
            assert owner["command"] == "third"
    assert not (run.path / "lock.json").exists()


@pytest.mark.slow
def test_of_writers_that_start_together_exactly_one_wins(run: RunDir) -> None:
    for _ in range(3):
        with holders(run.path, 4) as processes:
            for process in processes:
                tell(process)
            answers = [answer(process) for process in processes]
            assert sum(text == "held" for text in answers) == 1
            assert sum(text.startswith("refused 8") for text in answers) == 3


def test_the_same_process_can_not_hold_a_run_twice(run: RunDir) -> None:
    with run.lock("one"):
        with pytest.raises(RunInUseError), RunDir(run.path).lock("two"):
            pass
        assert (run.path / "lock.json").exists()
    with run.lock("again"):
        pass


def test_a_lost_card_still_locks(run: RunDir) -> None:
    with run.lock("one"):
        for text in ("", "{}", "[]", '{"pid": 1}'):
            (run.path / "lock.json").write_text(text)
            with pytest.raises(RunInUseError, match="another process"), run.lock("two"):
                pass


def test_recipe_and_extensions_come_back(run: RunDir, tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path)
    run.save_recipe(recipe)
    assert run.load_recipe() == recipe
    assert isinstance(run.load_recipe(), Recipe)
    assert run.load_extensions() == ()
    run.save_extensions([Extension(10, 5), Extension(15, 2)])
    assert run.load_extensions() == (Extension(10, 5), Extension(15, 2))
    assert not list(run.path.glob(".tmp-*"))


def test_no_run_and_a_broken_one_say_so(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no recipe\.json"):
        RunDir(tmp_path / "nowhere").load_recipe()
    run.recipe_file.write_text('{"name": "x"}')
    with pytest.raises(MissingError, match="can't be read"):
        run.load_recipe()


def test_every_sitting_is_described(run: RunDir) -> None:
    run.save_environment({"from_step": 0})
    run.save_environment({"from_step": 7})
    stored = json.loads(run.environment_file.read_bytes())
    assert [sitting["from_step"] for sitting in stored["sittings"]] == [0, 7]
    assert stored["threads"] >= 1
    run.environment_file.write_text("broken")
    run.save_environment({"from_step": 9})
    stored = json.loads(run.environment_file.read_bytes())
    assert [sitting.get("from_step") for sitting in stored["sittings"]] == [None, 9]


def test_modes_follow_the_umask(run: RunDir, tmp_path: Path) -> None:
    run.save_recipe(small.recipe(tmp_path))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(run.recipe_file.stat().st_mode) == 0o666 & ~mask


def test_a_place_that_is_taken_is_a_shortage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="can't be made") as caught:
        RunDir(tmp_path / "file" / "run").create()
    assert caught.value.exit_code == 7


def test_waiting_for_nothing(run: RunDir) -> None:
    started = time.monotonic()
    with run.lock("one"), pytest.raises(RunInUseError), RunDir(run.path).lock("two"):
        pass
    assert time.monotonic() - started < 2
