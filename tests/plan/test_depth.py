"""Deep models are estimated from two shallow ones: as if they had been traced whole."""

from __future__ import annotations

from typing import Any

import pytest

from valkyrie_core import Recipe
from valkyrie_core.plan import depth
from valkyrie_core.plan.depth import StepEstimator
from valkyrie_core.plan.seconds import Rates

RATES = Rates(1e11, 2e10, 5e-6)


def recipe(**train: Any) -> Recipe:
    overrides = [
        "model.core.repeat=7",
        "model.dim=64",
        *(f"train.{key}={value}" for key, value in train.items()),
    ]
    return Recipe.load("tiny/hybrid", overrides)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"activation_checkpointing": "true"},
        {"grad_accum_steps": 2},
        {
            "optimizer": "{type: adafactor}",
            "update": "in_backward",
            "weights": "bf16",
            "activation_checkpointing": "true",
        },
        {"context_len": 2048, "batch_size": 1},
        # one operation updates all weights: it grows with depth, and is no operation more
        {"optimizer": "{type: adamw}", "batch_size": 1},
        {"context_schedule": "[{from_fraction: 0.5, context_len: 128}]"},
    ],
    ids=["plain", "checkpointing", "accumulation", "little-memory", "long", "adamw", "stages"],
)
def test_it_is_what_the_whole_model_takes(
    train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = recipe(**train)
    estimated = StepEstimator("fp32", RATES)(deep)
    monkeypatch.setattr(depth, "DEEP", 100)
    whole = StepEstimator("fp32", RATES)(deep)
    assert estimated.tensors == pytest.approx(whole.tensors, rel=0.02)
    assert estimated.seconds == pytest.approx(whole.seconds, rel=0.01)


def test_one_estimator_serves_recipes_that_differ() -> None:
    estimate = StepEstimator("fp32", RATES)
    first = estimate(recipe())
    other = estimate(recipe(context_len=128))
    assert other.tensors > first.tensors
    assert other.seconds > first.seconds
    small = recipe(optimizer="{type: adafactor}", update="in_backward", weights="bf16")
    assert estimate(small).tensors < first.tensors
    assert estimate(recipe()) == first, "another recipe between changes nothing"
