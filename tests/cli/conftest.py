"""Runs the whole program in this process, as a shell would."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from valkyrie_cli.main import main

TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "hybrid.yaml"


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as the one JSON object that it must be."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out, parse_constant=refuse_constant)
        assert isinstance(value, dict)
        return value


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The program sends the log to stderr; other tests look for it elsewhere."""
    logger = logging.getLogger("valkyrie")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield
    logger.setLevel(before[0])
    logger.propagate = before[1]
    logger.handlers[:] = before[2]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """cli("train", "x.yaml", stdin="text") -> Outcome."""

    def call(*args: str, stdin: str | bytes = "") -> Outcome:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
            capsys.readouterr()
            code = main(list(args))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own; packed data and measured peaks are made once for all of them."""
    path = tmp_path_factory.mktemp("cache")
    before = os.environ.get("VALKYRIE_CACHE")
    os.environ["VALKYRIE_CACHE"] = str(path)
    yield path
    if before is None:
        del os.environ["VALKYRIE_CACHE"]
    else:
        os.environ["VALKYRIE_CACHE"] = before


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with one trained run, `tiny-hybrid`; tests must leave it as it is."""
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    folder = tmp_path_factory.mktemp("runs")
    overrides = [f"runs_dir={folder}", "train.steps=6", "train.eval_every=3"]
    runs.train(Recipe.load(TINY, overrides))
    return folder
