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


def test_validations_and_samples_take_no_more_than_a_step(tmp_path: Path) -> None:
    """At a size where eight windows at once would be half as much again."""
    overrides = [
        "model.dim=256",
        "model.core.repeat=2",
        "train.batch_size=4",
        "train.grad_accum_steps=4",
        "train.context_len=2048",
        "train.steps=2",
        "train.activation_checkpointing=true",
    ]
    peaks = []
    for length, asked in (
        ("long", ["train.eval_tokens=16384", "train.sample_prompts=[The]"]),
        ("short", ["train.eval_tokens=256", "train.sample_prompts=[]"]),
    ):
        file = tmp_path / f"{length}.json"
        Recipe.load("tiny/hybrid", [*overrides, *asked]).save(file)
        peak, _, _ = alone.call("benchmarks.plan_accuracy", "train_alone", str(file), 2)
        peaks.append(peak)
    assert peaks[0] < 1.1 * peaks[1]


def test_a_sample_is_drawn_with_a_copy_of_the_weights() -> None:
    little = [
        "train.optimizer={type: adafactor}",
        "train.update=in_backward",
        "train.weights=bf16",
        # in fp32 the step itself takes more than a copy of weights in bf16 does
        "train.precision=bf16",
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
