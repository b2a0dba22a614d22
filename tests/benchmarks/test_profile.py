"""The profile knows the kinds of work by the names that torch's profiler gives."""

from __future__ import annotations

import pytest
import torch

from benchmarks.profile import KINDS, REST, kind_of, split


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::matmul", REST),
        ("GeneratedBackwardFor_valkyrie_time_mix_default", "WKV-7 with its gates"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("valkyrie::linear_cross_entropy_backward", "loss"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::mul", REST),
    ],
)
def test_operators_have_a_kind(operator: str, kind: str) -> None:
    assert kind_of(operator).startswith(kind)


def test_a_call_is_split_by_kind() -> None:
    x = torch.randn(256, 256)
    times = split(lambda: [x @ x for _ in range(10)], 2)  # type: ignore[arg-type,return-value]
    assert set(times) == {*KINDS, REST}
    assert times["matrix products"] > 0.5 * sum(times.values())
    assert times["attention"] == 0
