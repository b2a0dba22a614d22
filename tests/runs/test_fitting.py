"""`train.fit` from the recipe to the run: what does not fit is changed, said, kept and resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from valkyrie_core import Recipe, runs
from valkyrie_core.errors import ResourceError
from valkyrie_core.plan.recipe_plan import Here
from valkyrie_core.plan.seconds import Rates
from valkyrie_core.runs import fitting

HELD = 100 << 20


def small_machine(monkeypatch: pytest.MonkeyPatch, free: int, speed: float = 1e12) -> None:
    """A machine that has so many bytes free beside what Python takes."""
    here = Here("cpu", "a small one", "fp32", Rates(speed, speed, 0.0), HELD + free, HELD)
    monkeypatch.setattr(fitting, "examine", lambda *_: here)


def recipe(folder: Path, *overrides: str) -> Recipe:
    return Recipe.load(
        "tiny/hybrid",
        [
            f"runs_dir={folder}",
            "train.steps=2",
            "train.eval_tokens=256",
            "train.fit={step_seconds: 100}",
            *overrides,
        ],
    )


def test_what_fits_is_trained_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_machine(monkeypatch, free=1 << 30)
    written = recipe(tmp_path)
    assert fitting.fitted(written, goes_on=False) == written


def test_what_does_not_fit_is_changed_said_kept_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("valkyrie").propagate = True
    small_machine(monkeypatch, free=700 << 10)
    written = recipe(tmp_path)
    with caplog.at_level(logging.INFO, logger="valkyrie"):
        runs.train(written)
    stored = json.loads((tmp_path / "tiny-hybrid" / "recipe.json").read_text())["train"]
    assert stored["weights"] == "bf16"
    assert stored["update"] == "in_backward"
    assert stored["optimizer"]["type"] == "adafactor"
    assert stored["activation_checkpointing"]
    for key in ("weights", "update", "optimizer", "activation_checkpointing"):
        assert f"train.{key}: " in caplog.text
    assert "All 2 steps would take" in caplog.text
    # elsewhere there is room; the run stays what it became
    small_machine(monkeypatch, free=1 << 30)
    with caplog.at_level(logging.INFO, logger="valkyrie"):
        report = runs.train(written, resume=True, extend_steps=None)
    assert report.finished
    report = runs.train(written, extend_steps=1)
    assert report.steps == 3
    assert "was fitted to a machine when it began, and keeps its train." in caplog.text
    assert json.loads((tmp_path / "tiny-hybrid" / "recipe.json").read_text())["train"] == stored


def test_a_schedule_is_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("valkyrie").propagate = True
    small_machine(monkeypatch, free=1 << 30, speed=1e7)
    schedule = "train.context_schedule=[{from_fraction: 0.5, context_len: 128}]"
    with caplog.at_level(logging.INFO, logger="valkyrie"):
        written = recipe(tmp_path, schedule, "train.fit.step_seconds=0.0001")
        found = fitting.fitted(written, goes_on=False, steps=6).train
    assert found.context_schedule == ()
    assert (
        'train.context_schedule: [{"from_fraction": 0.5, "context_len": 128}] -> []' in caplog.text
    )
    assert "All 6 steps would take" in caplog.text
    assert "longer than train.fit.step_seconds" in caplog.text


def test_a_fitted_run_s_recipe_begins_another_one_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_machine(monkeypatch, free=1 << 30)
    written = recipe(tmp_path, "train.fit.changed=[batch_size]")
    begun = fitting.fitted(written, goes_on=False).train
    assert begun.fit is not None
    assert begun.fit.changed == ()


def test_slow_machines_get_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch, free=1 << 30, speed=1e7)
    found = fitting.fitted(recipe(tmp_path, "train.fit.step_seconds=3"), goes_on=False).train
    assert found.batch_size * found.context_len < 256
    assert found.optimizer.type == "muon"


def test_too_small_a_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch, free=1000)
    with pytest.raises(ResourceError, match="does not fit"):
        fitting.fitted(recipe(tmp_path), goes_on=False)
    assert not (tmp_path / "tiny-hybrid").exists(), "nothing was written"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.25 s"), (41, "41 s"), (600, "10 min"), (9000, "2.5 h"), (864e4, "100 days")],
)
def test_durations_are_rough(seconds: float, words: str) -> None:
    assert fitting.duration(seconds) == words
    assert fitting.duration(1000 * fitting.YEAR) == "1,000 years"
