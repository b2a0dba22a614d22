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
