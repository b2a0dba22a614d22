"""What is compared is of one size."""

from __future__ import annotations

import pytest

from benchmarks import models, peers
from benchmarks.models import HYBRID, M12, M50, PURE, TINY, Size


@pytest.mark.parametrize("size", [TINY, M12, M50], ids=lambda size: size.name)
def test_models_of_one_size_have_as_many_parameters(size: Size) -> None:
    counts = [models.build(size, pattern).num_parameters() for pattern in (HYBRID, PURE)]
    try:
        counts.append(sum(p.numel() for p in peers.llama(size).parameters()))
    except peers.AbsentError:
        matrices = 4 * size.dim**2 + 3 * size.dim * size.swiglu
        counts.append(size.vocab_size * size.dim + size.layers * matrices)
    assert max(counts) / min(counts) < 1.02


def test_no_weight_is_zero() -> None:
    for parameter in models.build(TINY, HYBRID).parameters():
        assert bool(parameter.any())
