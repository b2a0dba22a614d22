"""How planning is wired to this machine, and what training says of its plan."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.plan.recipes import ROOT
from tests.train import small
from valkyrie_core import runs
from valkyrie_core.errors import UsageError
from valkyrie_core.recipe import Recipe
from valkyrie_core.runs import planning, prediction
from valkyrie_core.runs.planning import parse_memory

HYBRID = ROOT / "tiny" / "hybrid.yaml"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24 G", 24 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5KiB", 1536),
        ("2 TiB", 2 * 2**40),
        ("1000", 1000),
        ("1000B", 1000),
        (" 3kB ", 3000),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1 GiBs", "1e9", "24gib", "1,5GiB"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory(text)


def test_a_process_that_cannot_be_measured_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> int:
        raise OSError("no process here")

    monkeypatch.setenv("VALKYRIE_CACHE", str(tmp_path))
    monkeypatch.setattr(planning, "measure_held_bytes", broken)
    with caplog.at_level(logging.WARNING, "valkyrie"):
        report = runs.plan(Recipe.load(HYBRID))
    assert report.bytes.process_peak is None
    assert report.bytes.peak > 0
    assert report.fit is None
    assert "no process here" in caplog.text


def train(tmp_path: Path, steps: int) -> runs.TrainReport:
    overrides = [f"runs_dir={tmp_path}", "train.eval_tokens=256", f"train.steps={steps}"]
    return runs.train(Recipe.load(HYBRID, overrides))


def test_training_says_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prediction, "WORTH_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "valkyrie"):
        report = train(tmp_path / "told", 4)
    lines = [line for line in caplog.messages if line.startswith("predicted:")]
    assert len(lines) == 1
    assert "measured so far" in lines[0]
    assert report.predicted is not None
    assert report.predicted.seconds_per_step is not None
    assert report.measured is not None
    assert report.measured.peak_bytes is not None
    # the prediction draws no number and changes no weight
    monkeypatch.setattr(prediction, "WORTH_SECONDS", 1e9)
    silent = train(tmp_path / "silent", 4)
    assert silent.train_loss == report.train_loss
    assert silent.val_bpb == report.val_bpb


def test_a_prediction_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing was measured before: rates are, and draw no number that training has."""
    monkeypatch.setattr(prediction, "WORTH_SECONDS", 0.0)
    monkeypatch.setenv("VALKYRIE_CACHE", str(tmp_path / "cache"))
    digests = []
    for name in ("measured", "known"):
        train(tmp_path / name, 4)
        (run,) = (tmp_path / name).iterdir()
        digests.append(small.digest(run))
    assert digests[0] == digests[1]


def test_stages_are_as_long_as_they_are() -> None:
    plain = ["model.dim=64", "train.steps=10", "train.batch_size=8", "train.context_len=64"]
    staged = "train.context_schedule=[{from_fraction: 0.9, context_len: 512}]"
    short = runs.plan(Recipe.load(HYBRID, plain)).seconds[0]
    both = runs.plan(Recipe.load(HYBRID, [*plain, staged])).seconds[0]
    long = ["train.batch_size=1", "train.context_len=512"]
    last = runs.plan(Recipe.load(HYBRID, [*plain, *long])).seconds[0]
    assert last.step != pytest.approx(short.step, rel=0.01)
    assert both.recipe == pytest.approx(9 * short.step + last.step, rel=1e-6)


def test_a_short_training_is_not_kept_waiting(tmp_path: Path) -> None:
    report = train(tmp_path, 4)
    assert report.predicted is None
    assert report.measured is not None
