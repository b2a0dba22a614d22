"""The command line, and every benchmark at its small sizes through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as command
from benchmarks import result, tables
from benchmarks.menu import MENU
from benchmarks.result import ROOT, Findings
from benchmarks.timing import Announce

SLOW = set(MENU) - {"wkv"}
"""Those that import what takes long to import."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MENU]
)
def test_every_benchmark_runs(name: str, tmp_path: Path) -> None:
    before = sorted(result.RESULTS.glob("*"))
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", name, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    content = json.loads(next(tmp_path.glob(f"*/{name}.json")).read_text(encoding="utf-8"))
    assert content["measurements"]
    assert all(x["median"] > 0 for x in content["measurements"] if x["unit"] != "MiB")
    assert {"torch"} <= set(content["origin"]["versions"])
    assert run.stdout.startswith(f"## {name}: ")
    assert "Traceback" not in run.stderr
    assert sorted(result.RESULTS.glob("*")) == before


def test_list_and_wrong_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MENU)
    with pytest.raises(SystemExit) as caught:
        command.main(["--only", "wvk"])
    assert caught.value.code == 2
    assert "did you mean wkv?" in capsys.readouterr().err


class Fakes:
    """Benchmarks that take no time: some work, one fails, one is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, object]) -> None:
        self.outcomes = outcomes
        monkeypatch.setattr(command.quiet, "disturbance", lambda: None)
        monkeypatch.setattr(command, "keep_memory", lambda: None)
        monkeypatch.setattr(
            type(MENU["wkv"]), "sizes", lambda entry, which: (entry.name, which), raising=True
        )
        monkeypatch.setattr(type(MENU["wkv"]), "run", self.run)

    def run(self, sizes: tuple[str, str], announce: Announce) -> Findings:
        """What was asked for: findings, or an exception."""
        announce("at work")
        outcome = self.outcomes[sizes[0]]
        if isinstance(outcome, BaseException):
            raise outcome
        findings = Findings(notes=[f"sizes {sizes[1]}"])
        findings.number("case", "peer", "ms", 1.0)
        return findings


def test_ctrl_c_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Fakes(monkeypatch, {"wkv": None, "block": KeyboardInterrupt()})
    arguments = ["--only", "wkv", "block", "--out", str(tmp_path)]
    assert command.main(arguments) == command.STOPPED
    assert [path.name for path in tmp_path.glob("*/*")] == ["wkv.json"]
    assert "finished and kept: wkv" in capsys.readouterr().err


def test_one_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Fakes(monkeypatch, {"wkv": ValueError("no [kernel] here"), "block": None})
    assert command.main(["--only", "wkv", "block", "--out", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.glob("*/*")] == ["block.json"]
    shown = capsys.readouterr()
    assert "wkv could not run: no [kernel] here" in shown.err
    assert "sizes FULL" in shown.out


def test_quick_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Fakes(monkeypatch, {"wkv": None})
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "write", lambda: pytest.fail("the page is touched"))
    assert command.main(["--only", "wkv", "--quick"]) == 0
    assert not list(tmp_path.iterdir())
