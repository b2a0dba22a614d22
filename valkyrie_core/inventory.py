"""Finds runs and reads what their directories say, without torch: answers come at once."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from valkyrie_core.errors import MissingError
from valkyrie_core.report import RunsListReport, RunsShowReport, RunSummary

_STEP = re.compile(r"step-(\d{6,12})")
_NUM_NEAREST = 3


class RunPlace(NamedTuple):
    """Where a run lives."""

    name: str
    path: Path


def find_run(
    run: str | Path | None = None, runs_dir: str | Path = "runs", *, usable: bool = True
) -> RunPlace:
    """The run of that name, or in that directory; None: the newest.

    A name is looked up in `runs_dir`. `usable` asks for a checkpoint.

    Raises:
        MissingError: there is no such run, or it has no checkpoint; the hint names the nearest.
    """
    folder = Path(runs_dir)
    if run is None:
        return _newest(folder, usable=usable)
    for path in (Path(run), folder / run):
        if is_run(path):
            place = RunPlace(path.resolve().name, path)
            break
    else:
        names = [path.name for path in run_directories(folder)]
        nearest = difflib.get_close_matches(str(run), names, n=_NUM_NEAREST, cutoff=0.4)
        if nearest:
            hint = "did you mean " + " or ".join(nearest) + "?"
        elif names:
            hint = f"`valkyrie runs list --runs-dir {folder}` shows what there is"
        else:
            hint = f"there are no runs in {folder} yet: valkyrie train quickstart"
        raise MissingError(
            f"there is no run {str(run)!r}, neither a directory nor in {folder}", hint=hint
        )
    if usable and not checkpoint_steps(place.path):
        raise MissingError(
            f"the run {place.name} has no checkpoint yet",
            hint="its training ended before the first one; train it again",
        )
    return place


def _newest(folder: Path, *, usable: bool) -> RunPlace:
    candidates = list(run_directories(folder))
    trained = [path for path in candidates if checkpoint_steps(path)[:1] not in ([], [0])]
    started = [path for path in candidates if checkpoint_steps(path)]
    # a run that was stopped before its first step comes after every one that learned something
    pool = trained or started or ([] if usable else candidates)
    if not pool:
        raise MissingError(
            f"there is no trained run in {folder}", hint="train one: valkyrie train quickstart"
        )
    newest = max(pool, key=lambda path: (_modified(path), path.name))
    return RunPlace(newest.name, newest)


def is_run(path: Path) -> bool:
    """Whether a directory looks like a run."""
    return (path / "recipe.json").is_file() or (path / "checkpoints").is_dir()


def run_directories(folder: Path) -> Iterator[Path]:
    """Every run in a folder, by name."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))


def checkpoint_steps(path: Path) -> list[int]:
    """The steps of a run's checkpoints, newest first, unverified."""
    directory = path / "checkpoints"
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in directory.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _modified(path: Path) -> float:
    """When the newest checkpoint was written, in seconds; without one, the directory's time."""
    steps = checkpoint_steps(path)
    newest = path / "checkpoints" / f"step-{steps[0]:06d}" if steps else path
    try:
        return newest.stat().st_mtime
    except OSError:
        # pruned or deleted between the listing and now
        return 0.0


def list_runs(runs_dir: str | Path = "runs") -> RunsListReport:
    """All runs of a folder, newest first."""
    folder = Path(runs_dir)
    paths = sorted(run_directories(folder), key=_modified, reverse=True)
    return RunsListReport(runs_dir=str(folder), runs=[summarize(path) for path in paths])


def show_run(run: str | Path) -> RunsShowReport:
    """Everything that a run's directory says."""
    path = Path(run)
    if not is_run(path):
        raise MissingError(f"{path} is not a run", hint="`valkyrie runs list` shows the runs")
    files = {
        entry.name: entry.stat().st_size
        for entry in sorted(path.iterdir())
        if entry.is_file() and not entry.name.startswith((".", "lock"))
    }
    return RunsShowReport(
        summary=summarize(path),
        checkpoints=checkpoint_steps(path),
        files=files,
        recipe=_read_object(path / "recipe.json"),
        environment=_read_object(path / "environment.json"),
        report=_read_object(path / "report.json"),
        validations=[row for row in metric_rows(path) if row.get("kind") == "val"],
    )


def summarize(path: Path) -> RunSummary:
    """One line about a run; what can't be read is None, never an error."""
    recipe = _read_object(path / "recipe.json")
    steps = checkpoint_steps(path)
    total = _horizon(path, recipe)
    rows = metric_rows(path)
    losses = [row["loss"] for row in rows if row.get("kind") == "train" and _finite(row, "loss")]
    scores = [row["bpb"] for row in rows if row.get("kind") == "val" and _finite(row, "bpb")]
    description = recipe.get("description") if recipe else None
    return RunSummary(
        run=path.resolve().name,
        directory=str(path),
        state=_state(path, recipe, steps, total),
        steps=steps[0] if steps else None,
        total_steps=total,
        val_bpb=scores[-1] if scores else None,
        train_loss=losses[-1] if losses else None,
        modified=datetime.fromtimestamp(_modified(path)).astimezone().isoformat(timespec="seconds"),
        bytes=sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()),
        description=description if isinstance(description, str) else "",
    )


def _state(path: Path, recipe: dict[str, Any] | None, steps: list[int], total: int | None) -> Any:
    if _is_locked(path):
        return "running"
    if recipe is None or not steps:
        return "broken"
    return "finished" if total is not None and steps[0] >= total else "stopped"


def _is_locked(path: Path) -> bool:
    """Whether the process that holds the run is alive; the card of a killed one stays behind."""
    owner = _read_object(path / "lock.json")
    if owner is None or not isinstance(owner.get("pid"), int):
        return False
    # signal 0 asks whether a process lives; on Windows it would be an event sent to it
    if owner.get("host") != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _horizon(path: Path, recipe: dict[str, Any] | None) -> int | None:
    """The step at which the run is finished."""
    train = recipe.get("train") if recipe else None
    steps = train.get("steps") if isinstance(train, dict) else None
    extensions = _read_json(path / "extensions.json")
    if isinstance(extensions, list):
        for entry in extensions:
            if isinstance(entry, dict) and isinstance(entry.get("steps"), int):
                steps = int(entry.get("start", 0)) + entry["steps"]
    return steps if isinstance(steps, int) else None


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a torn or foreign line is passed over."""
    file = path / "metrics.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _finite(row: dict[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def is_transcript(path: Path) -> bool:
    """Whether a file looks like a saved conversation."""
    schema = (_read_object(path) or {}).get("schema")
    return isinstance(schema, str) and schema.startswith("valkyrie.transcript/")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _read_object(path: Path) -> dict[str, Any] | None:
    value = _read_json(path)
    return value if isinstance(value, dict) else None
