"""A run that is killed anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train import small
from tests.train.forks import KillAt, kill_after, run_to_the_end, wait
from tests.train.forks import fork as start
from valkyrie_core.recipe import Recipe
from valkyrie_core.train import journal
from valkyrie_core.train.storage import Storage

SETTINGS: dict[str, Any] = {
    "steps": 5,
    "eval_every": 2,
    "save_every": 1,
    "log_every": 1,
    "grad_accum_steps": 2,
    "optimizer": small.MUON,
    "sample_prompts": ["So foul"],
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing costs more than all the rest; its file operations stay."""
    monkeypatch.setattr(journal, "draw_curves", lambda rows, title: repr(rows).encode())


class Trial:
    """One recipe, trained in children: undisturbed as the reference, then killed."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.recipe: Recipe = small.recipe(folder, **SETTINGS)
        self.path = Path(self.recipe.runs_dir) / self.recipe.name
        self.cache = cache
        hook = KillAt()
        started = time.monotonic()
        # in this process, which also warms everything up that the children inherit
        small.train(self.recipe, cache=cache, storage=Storage(hook))
        self.seconds = time.monotonic() - started
        self.points = hook.count
        self.reference = self.result()
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.path)

    def result(self) -> tuple[str, list[dict[str, Any]], str]:
        everything = [*self.path.iterdir(), *(self.path / "checkpoints").iterdir()]
        assert [path for path in everything if path.name.startswith(".")] == []
        samples = (self.path / "samples.md").read_text(encoding="utf-8")
        return small.digest(self.path), small.rows(self.path), samples

    def go_on(self, at: int = 0) -> Callable[[], None]:
        """What a user would type: --resume where there is a run, else a fresh start."""

        def work() -> None:
            resume = (self.path / "recipe.json").exists()
            small.train(self.recipe, cache=self.cache, resume=resume, storage=Storage(KillAt(at)))

        return work


@pytest.fixture
def trial(folder: Path, cache: Path) -> Trial:
    return Trial(folder, cache)


def killed_at(trial: Trial, points: range) -> None:
    for at in points:
        assert wait(start(trial.go_on(at))) == -signal.SIGKILL, f"point {at}"
        run_to_the_end(trial.go_on())
        assert trial.result() == trial.reference, f"killed at point {at} of {trial.points}"
        trial.clear()


def test_killed_at_some_points(trial: Trial) -> None:
    """A sample of the points: a stride that is no divisor of a save's length meets all kinds."""
    assert trial.points > 150
    killed_at(trial, range(1, trial.points + 1, 17))


@pytest.mark.slow
def test_killed_at_every_point(trial: Trial) -> None:
    killed_at(trial, range(1, trial.points + 1))


@pytest.mark.slow
def test_killed_at_two_points_in_a_row(trial: Trial) -> None:
    """The second kill hits the tidying up after the first."""
    for at in range(1, trial.points + 1, 5):
        assert wait(start(trial.go_on(at))) == -signal.SIGKILL
        for again in (1, 2, 3, 5, 8, 13, 21):
            wait(start(trial.go_on(again)))
        run_to_the_end(trial.go_on())
        assert trial.result() == trial.reference, f"killed at point {at} of {trial.points}"
        trial.clear()


def random_kills(trial: Trial, enough: int) -> None:
    """Kill at random moments until the run is done; again, until it was killed often enough."""
    rng, kills = random.Random(0), 0
    seconds = min(trial.seconds, 1.0)
    for _ in range(100 * enough):
        if kill_after(trial.go_on(), rng.uniform(0.0, 1.2) * seconds) != 0:
            kills += 1
            continue
        assert trial.result() == trial.reference
        trial.clear()
        if kills >= enough:
            return
    raise AssertionError("no end of it")


def test_killed_at_random_moments_until_it_is_done(trial: Trial) -> None:
    random_kills(trial, enough=4)


@pytest.mark.slow
def test_killed_at_random_moments_many_times(trial: Trial) -> None:
    random_kills(trial, enough=25)
