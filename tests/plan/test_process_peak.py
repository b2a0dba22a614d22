"""The predicted peak of a training process against the system's own word."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import alone
from tests.plan.recipes import TINY, name
from valkyrie_core import runs
from valkyrie_core.recipe import Recipe


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=name)
def test_peak_of_a_real_training(path: Path) -> None:
    predicted = runs.plan(Recipe.load(path)).bytes.process_peak
    assert predicted is not None
    # all steps: later stages of a recipe take more
    steps = Recipe.load(path).train.steps
    real, _, _ = alone.call("benchmarks.plan_accuracy", "train_alone", str(path), steps)
    assert predicted == pytest.approx(real, rel=0.2)


def test_validations_and_samples_take_no_more_than_is_planned(tmp_path: Path) -> None:
    """At a size where tensors are most of a process, and a validation could be the largest."""
    overrides = [
        "model.dim=256",
        "model.core.repeat=2",
        "train.batch_size=4",
        "train.grad_accum_steps=4",
        "train.context_len=2048",
        "train.steps=2",
        "train.eval_tokens=16384",
        "train.activation_checkpointing=true",
        "train.sample_prompts=[The]",
    ]
    recipe = Recipe.load("tiny/hybrid", overrides)
    report = runs.plan(recipe)
    assert report.bytes.process_peak is not None
    assert report.bytes.held is not None
    recipe.save(tmp_path / "large.json")
    real, _, _ = alone.call(
        "benchmarks.plan_accuracy", "train_alone", str(tmp_path / "large.json"), 2
    )
    assert real - report.bytes.held > 100 << 20
    # a validation of eight windows would be half as much again
    assert report.bytes.process_peak == pytest.approx(real, rel=0.3), (report.bytes, real)


def test_a_sample_is_drawn_with_a_copy_of_the_weights() -> None:
    little = [
        "train.optimizer={type: adafactor}",
        "train.update=in_backward",
        "train.weights=bf16",
        "train.batch_size=1",
        "train.context_len=16",
        "model.dim=256",
    ]
    silent = Recipe.load("tiny/hybrid", [*little, "train.sample_prompts=[]"])
    asked = Recipe.load("tiny/hybrid", [*little, "train.sample_prompts=[a]"])
    peaks = [runs.plan(one).bytes.peak for one in (silent, asked)]
    weights = runs.plan(asked).bytes.weights
    assert peaks[1] >= 1.7 * weights
    assert peaks[0] < peaks[1]
