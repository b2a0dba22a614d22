from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from valkyrie_core.errors import CheckpointError
from valkyrie_core.train.rng import RngState


def draw() -> list[float]:
    return [
        *torch.rand(3).tolist(),
        float(torch.randn(1)),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        *torch.randperm(9).tolist(),
    ]


@pytest.mark.parametrize("warm", [0, 1, 7])
def test_generators_go_on_where_they_were(warm: int) -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    for _ in range(warm):
        draw()
    state = RngState.capture()
    expected = [draw() for _ in range(3)]
    # through JSON, as in a checkpoint: a gauss value in waiting must come back exactly
    again = RngState.from_parts(state.tensors, json.loads(json.dumps(state.meta)))
    draw()
    again.restore()
    assert [draw() for _ in range(3)] == expected


def test_incomplete_states_are_refused() -> None:
    state = RngState.capture()
    with pytest.raises(CheckpointError, match="numpy"):
        RngState.from_parts({"torch": state.tensors["torch"]}, state.meta)
