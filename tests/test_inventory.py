"""Runs are found by name, by directory or by age; what is damaged is told, not raised."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from valkyrie_core.errors import MissingError
from valkyrie_core.inventory import (
    find_run,
    is_transcript,
    list_runs,
    metric_rows,
    show_run,
    summarize,
)


def make_run(
    folder: Path, name: str, *, steps: tuple[int, ...] = (0, 5), age: float = 0, total: int = 5
) -> Path:
    path = folder / name
    (path / "checkpoints").mkdir(parents=True)
    recipe = {"name": name, "description": f"about {name}", "train": {"steps": total}}
    (path / "recipe.json").write_text(json.dumps(recipe))
    for step in steps:
        checkpoint = path / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir()
        os.utime(checkpoint, (1_700_000_000 - age, 1_700_000_000 - age))
    return path


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_newest_run_that_learned_something(tmp_path: Path) -> None:
    make_run(tmp_path, "old", age=100)
    make_run(tmp_path, "new", age=10)
    make_run(tmp_path, "untrained", steps=(0,), age=1)
    make_run(tmp_path, "empty", steps=())
    assert find_run(None, tmp_path).name == "new"


def test_an_untrained_run_is_better_than_none(tmp_path: Path) -> None:
    make_run(tmp_path, "untrained", steps=(0,))
    make_run(tmp_path, "empty", steps=())
    assert find_run(None, tmp_path).name == "untrained"


def test_no_usable_run(tmp_path: Path) -> None:
    make_run(tmp_path, "empty", steps=())
    with pytest.raises(MissingError, match="no trained run") as caught:
        find_run(None, tmp_path)
    assert "valkyrie train" in (caught.value.hint or "")
    assert find_run(None, tmp_path, usable=False).name == "empty"
    with pytest.raises(MissingError, match="no checkpoint"):
        find_run("empty", tmp_path)


def test_by_name_and_by_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path, "one")
    assert find_run("one", tmp_path) == ("one", path)
    assert find_run(path, "elsewhere") == ("one", path)
    monkeypatch.chdir(path)
    assert find_run(".", "elsewhere").name == "one"


def test_unknown_names_up_to_three_of_the_nearest(tmp_path: Path) -> None:
    for name in ("quick-a", "quick-b", "quick-c", "quick-d", "zebra"):
        make_run(tmp_path, name)
    with pytest.raises(MissingError) as caught:
        find_run("quick-e", tmp_path)
    hint = caught.value.hint or ""
    assert hint.count("quick-") == 3
    assert "zebra" not in hint
    with pytest.raises(MissingError) as caught:
        find_run("0000", tmp_path)
    assert "runs list" in (caught.value.hint or "")


def test_states(tmp_path: Path) -> None:
    make_run(tmp_path, "finished")
    make_run(tmp_path, "stopped", steps=(0, 3))
    make_run(tmp_path, "broken", steps=())
    (make_run(tmp_path, "unreadable") / "recipe.json").write_text("{")
    extended = make_run(tmp_path, "extended")
    (extended / "extensions.json").write_text(json.dumps([{"start": 5, "steps": 4}]))
    states = {run.run: (run.state, run.total_steps) for run in list_runs(tmp_path).runs}
    assert states == {
        "finished": ("finished", 5),
        "stopped": ("stopped", 5),
        "broken": ("broken", 5),
        "unreadable": ("broken", None),
        "extended": ("stopped", 9),
    }


def test_running_means_that_the_process_lives(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def state(pid: int, host: str) -> str:
        (path / "lock.json").write_text(json.dumps({"pid": pid, "host": host}))
        return summarize(path).state

    assert state(os.getpid(), socket.gethostname()) == "running"
    assert state(dead.pid, socket.gethostname()) == "finished"
    assert state(dead.pid, "another-machine") == "running"


def test_numbers_come_from_the_newest_rows(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one")
    write_rows(
        path,
        {"kind": "train", "step": 1, "loss": 3.0},
        {"kind": "val", "step": 1, "bpb": 2.5},
        {"kind": "train", "step": 2, "loss": 2.0},
        {"kind": "sample", "step": 2, "text": "\u2028"},
    )
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "loss": NaN}\n{"kind": "val", "bpb": 0.')
    summary = summarize(path)
    assert (summary.train_loss, summary.val_bpb) == (2.0, 2.5)
    assert len(metric_rows(path)) == 5
    assert [row["step"] for row in show_run(path).validations] == [1]


def test_odd_neighbours_are_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    checkpoints = tmp_path / "one" / "checkpoints"
    for name in ("step-xyz", "step-7", ".tmp-step-000009-1", "damaged-step-000008"):
        (checkpoints / name).mkdir()
    (run,) = list_runs(tmp_path).runs
    assert run.steps == 5
    assert list_runs(tmp_path / "nothing").runs == []


def test_show_says_what_lies_there(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one")
    (path / "report.json").write_text('{"schema": "valkyrie.train/1"}')
    (path / "environment.json").write_text("[" * 100_000)
    shown = show_run(path)
    assert shown.checkpoints == [5, 0]
    assert set(shown.files) == {"recipe.json", "report.json", "environment.json"}
    assert shown.environment is None
    assert shown.report == {"schema": "valkyrie.train/1"}
    with pytest.raises(MissingError):
        show_run(tmp_path / "none")


def test_transcripts_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, expected in (
        ('{"schema": "valkyrie.transcript/1"}', True),
        ('{"schema": 1}', False),
        ("[]", False),
        ("text", False),
    ):
        path.write_text(text)
        assert is_transcript(path) is expected
    assert not is_transcript(tmp_path / "none")
