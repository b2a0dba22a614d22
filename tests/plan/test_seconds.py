"""Times from operations and rates."""

from __future__ import annotations

import itertools

from valkyrie_core.plan.devices import PUBLISHED
from valkyrie_core.plan.seconds import Rates, least_seconds, step_seconds
from valkyrie_core.plan.trace import Work

RATES = Rates(flops_per_second=100.0, bytes_per_second=10.0, start_seconds=1.0)


def test_each_operation_waits_for_what_takes_longer() -> None:
    assert step_seconds([Work(200, 10)], RATES) == 3.0
    assert step_seconds([Work(0, 50)], RATES) == 6.0
    assert step_seconds([Work(200, 10), Work(0, 50)], RATES) == 9.0
    assert least_seconds(200, RATES) == 2.0


def test_published_devices_are_ordered_and_plausible() -> None:
    assert [device.name for device in PUBLISHED] == ["RTX 4090", "A100 80GB", "H100 SXM"]
    for slower, faster in itertools.pairwise(PUBLISHED):
        assert slower.flops_per_second < faster.flops_per_second
        assert slower.bytes_per_second < faster.bytes_per_second
