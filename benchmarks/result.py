"""What a benchmark found, as JSON: medians, spread, ratios, and where and when they were measured.

Every kind of processor has a folder of its own. A peer that is absent in this run keeps the numbers
of its last one on that processor, each with its own date.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Spread, Timing
from valkyrie_core.machine import hardware

SCHEMA = 1
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")


class ResultError(Exception):
    """A result that can't be read or written; the message is one helpful line."""


class Gate(NamedTuple):
    """What a ratio has to reach, and what it is hoped to reach."""

    floor: float
    aim: float | None = None


class Origin(NamedTuple):
    """Where a number comes from."""

    date: str
    commit: str
    processor: str
    flags: tuple[str, ...]
    threads: int
    versions: dict[str, str]
    """Of torch and of the peers, by package."""

    @property
    def kind(self) -> str:
        """The kind of processor: makers give one name to several generations."""
        narrow = "avx2" in self.flags and "avx512f" not in self.flags
        return f"{self.processor} AVX2" if narrow else self.processor


@dataclass(frozen=True)
class Measurement:
    """One number of one peer."""

    case: str
    """What was asked of it: the length, the direction."""
    peer: str
    unit: str
    """ms, tokens/s, MB, ..."""
    median: float
    p10: float
    p90: float
    repeats: int
    first_call_seconds: float | None = None
    origin: Origin | None = None
    """None: that of the whole result."""


@dataclass(frozen=True)
class Ratio:
    """How many times better ours is than a peer, measured side by side."""

    what: str
    case: str
    ours: str
    theirs: str
    median: float
    p10: float
    p90: float
    floor: float | None = None
    aim: float | None = None
    unit: str = "x"
    origin: Origin | None = None
    """None: that of the whole result."""

    @property
    def verdict(self) -> str:
        """How the ratio stands to its floor and its aim; empty where it has none."""
        if self.floor is None:
            return ""
        if self.median < self.floor:
            return "below the floor"
        return "aim reached" if self.aim is not None and self.median >= self.aim else "floor holds"


@dataclass
class Findings:
    """What a benchmark gathers while it runs."""

    measurements: list[Measurement] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences that a reader of the tables needs."""
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that were left out, and why."""

    def milliseconds(self, case: str, timings: Mapping[str, Timing]) -> None:
        """Adds the times of a call."""
        for peer, timing in timings.items():
            spread = Spread(*(1e3 * value for value in timing.spread))
            self._add(case, peer, "ms", spread, timing)

    def rates(self, case: str, timings: Mapping[str, Timing], work: float, unit: str) -> None:
        """Adds how much work is done per second, where a call does `work`."""
        for peer, timing in timings.items():
            self._add(case, peer, unit, timing.rate(work), timing)

    def number(self, case: str, peer: str, unit: str, value: float) -> None:
        """Adds a number that was measured once."""
        self.measurements.append(Measurement(case, peer, unit, value, value, value, 1))

    def compare(
        self,
        what: str,
        case: str,
        ours: tuple[str, Timing],
        theirs: tuple[str, Timing],
        gate: Gate | None = None,
    ) -> None:
        """Adds how many times faster ours is than theirs."""
        spread = ours[1].times_faster_than(theirs[1])
        floor, aim = gate if gate is not None else (None, None)
        self.ratios.append(Ratio(what, case, ours[0], theirs[0], *spread, floor, aim))

    def share(
        self, what: str, case: str, ours: str, whole: str, percent: Spread, gate: Gate | None
    ) -> None:
        """Adds what percentage of a whole ours is."""
        floor, aim = gate if gate is not None else (None, None)
        self.ratios.append(Ratio(what, case, ours, whole, *percent, floor, aim, unit="%"))

    def _add(self, case: str, peer: str, unit: str, spread: Spread, timing: Timing) -> None:
        first = timing.first_seconds
        self.measurements.append(Measurement(case, peer, unit, *spread, len(timing.seconds), first))


@dataclass(frozen=True)
class Result:
    """Everything that one benchmark's file says."""

    name: str
    origin: Origin
    seconds: float
    """What the benchmark took in all."""
    others_share: float | None
    """The share of the machine's cores that other processes used meanwhile; None: unknown."""
    ratios: tuple[Ratio, ...]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]
    absent: dict[str, str]

    def keeping(self, old: Result) -> Result:
        """With the old numbers of the peers that are absent now."""
        gone = tuple(self.absent)
        if not gone:
            return self
        measurements = [
            replace(x, origin=x.origin or old.origin)
            for x in old.measurements
            if x.peer.startswith(gone)
        ]
        ratios = [
            replace(x, origin=x.origin or old.origin)
            for x in old.ratios
            if x.theirs.startswith(gone) or x.ours.startswith(gone)
        ]
        return replace(
            self,
            measurements=(*self.measurements, *measurements),
            ratios=(*self.ratios, *ratios),
        )


def origin(packages: Iterable[str] = ()) -> Origin:
    """Here and now."""
    processor = hardware.cpu()
    versions = {"torch": str(torch.__version__)}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Origin(
        datetime.date.today().isoformat(),
        _commit(),
        processor.model,
        processor.flags,
        torch.get_num_threads(),
        versions,
    )


def _commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def path_of(name: str, kind: str, folder: Path = RESULTS) -> Path:
    """Where a benchmark's result on a kind of processor lies."""
    words = re.sub(r"\((?:r|tm|c)\)", " ", kind.lower())
    return folder / (re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown") / f"{name}.json"


def kept(name: str, folder: Path = RESULTS) -> list[Result]:
    """The results of a benchmark on all processors, by the name of the processor.

    Raises:
        ResultError: a file is damaged or of another version.
    """
    return [_read(path) for path in sorted(folder.glob(f"*/{name}.json"))]


def load(name: str, kind: str, folder: Path = RESULTS) -> Result | None:
    """The kept result of a benchmark on a processor; None if there is none.

    Raises:
        ResultError: the file is damaged or of another version.
    """
    path = path_of(name, kind, folder)
    return _read(path) if path.exists() else None


def _read(path: Path) -> Result:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ResultError(f"{path}: schema {content['schema']}, not {SCHEMA}; delete it")
        return _parse(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{path} can't be read ({error}); delete it or restore it") from None


def check_writable(folder: Path) -> None:
    """Raises ResultError where no result could be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultError(f"{folder} can't be written: {error}") from None


def save(result: Result, folder: Path = RESULTS) -> Path:
    """Writes a result in one move.

    Raises:
        ResultError: it can't be written.
    """
    path = path_of(result.name, result.origin.kind, folder)
    text = json.dumps({"schema": SCHEMA, **_plain(asdict(result))}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ResultError(f"{path} can't be written: {error}") from None
    return path


def _plain(value: Any) -> Any:
    """Named tuples as objects, floats to six significant digits."""
    if isinstance(value, Origin):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _parse(content: dict[str, Any]) -> Result:
    def place(entry: dict[str, Any] | None) -> Origin | None:
        return None if entry is None else Origin(**{**entry, "flags": tuple(entry["flags"])})

    def items(kind: Any, key: str) -> tuple[Any, ...]:
        return tuple(kind(**{**x, "origin": place(x["origin"])}) for x in content[key])

    found = place(content["origin"])
    assert found is not None
    return Result(
        content["name"],
        found,
        content["seconds"],
        content["others_share"],
        items(Ratio, "ratios"),
        items(Measurement, "measurements"),
        tuple(content["notes"]),
        content["absent"],
    )
