from __future__ import annotations

import math

import pytest

from valkyrie_core.errors import CheckpointError
from valkyrie_core.train.schedule import (
    CosineConfig,
    Extension,
    LRPlan,
    WSDConfig,
    lr_scale,
)


def test_cosine_rises_then_falls_to_the_final_ratio() -> None:
    schedule = CosineConfig(warmup_steps=4, final_ratio=0.1)
    scales = [lr_scale(schedule, step, 24) for step in range(24)]
    assert scales[:4] == [0.25, 0.5, 0.75, 1.0]
    assert scales[4] == 1.0
    assert scales[14] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down
    assert scales[4:] == sorted(scales[4:], reverse=True)
    last = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 20))
    assert scales[-1] == pytest.approx(last)
    assert lr_scale(schedule, 24, 24) == pytest.approx(0.1)


def test_wsd_is_flat_between_warm_up_and_decay() -> None:
    schedule = WSDConfig(warmup_steps=2, decay_fraction=0.25, final_ratio=0.0)
    scales = [lr_scale(schedule, step, 20) for step in range(20)]
    assert scales[:2] == [0.5, 1.0]
    assert scales[2:16] == [1.0] * 14
    assert scales[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert lr_scale(schedule, 20, 20) == 0.0


@pytest.mark.parametrize("schedule", [CosineConfig(warmup_steps=50), WSDConfig(warmup_steps=50)])
def test_a_warm_up_longer_than_the_run_is_cut(schedule: CosineConfig | WSDConfig) -> None:
    scales = [lr_scale(schedule, step, 4) for step in range(4)]
    assert scales == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", [CosineConfig(warmup_steps=0), WSDConfig(warmup_steps=0)])
def test_every_step_learns_something(schedule: CosineConfig | WSDConfig) -> None:
    for steps in (1, 2, 7, 100):
        scales = [lr_scale(schedule, step, steps) for step in range(steps)]
        assert all(0 < scale <= 1 for scale in scales)


def test_an_extension_rewarms_from_the_final_ratio_and_decays_again() -> None:
    schedule = CosineConfig(warmup_steps=5, final_ratio=0.1)
    plan = LRPlan(schedule, 100, (Extension(100, 40),))
    assert plan.horizon == 140
    assert plan.ends == (100, 140)
    before = LRPlan(schedule, 100)
    assert [plan.scale(s) for s in range(100)] == [before.scale(s) for s in range(100)]
    # a tenth of 40 steps to warm up, from a tenth of the peak
    expected = [0.1 + 0.9 * share for share in (0.25, 0.5, 0.75, 1.0)]
    assert [plan.scale(s) for s in range(100, 104)] == pytest.approx(expected)
    assert plan.scale(139) < 0.12
    assert "100 to 140" in plan.describe_extension()
    assert "4 steps" in plan.describe_extension()


def test_extensions_follow_each_other_without_touching_earlier_steps() -> None:
    schedule = WSDConfig(warmup_steps=2)
    one = LRPlan(schedule, 30, (Extension(30, 20),))
    two = LRPlan(schedule, 30, (Extension(30, 20), Extension(50, 10)))
    assert [one.scale(s) for s in range(50)] == [two.scale(s) for s in range(50)]
    assert two.horizon == 60


@pytest.mark.parametrize(
    "history",
    [
        (Extension(29, 5),),
        (Extension(30, 0),),
        (Extension(30, 5), Extension(36, 5)),
        (Extension(30, 5), Extension(30, 5)),
    ],
)
def test_a_broken_extension_history_is_refused(history: tuple[Extension, ...]) -> None:
    with pytest.raises(CheckpointError, match="not a chain"):
        LRPlan(WSDConfig(), 30, history)
