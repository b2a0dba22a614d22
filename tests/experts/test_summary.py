"""A layer's report from choices and losses that are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from valkyrie_core.experts.history import History
from valkyrie_core.experts.knockout import KnockOuts
from valkyrie_core.experts.observe import LayerTrace, Trace
from valkyrie_core.experts.summary import CLOSES_GROUP, Setting, describe
from valkyrie_core.nn.moe.layer import MoEConfig
from valkyrie_core.report import LayerExperts

WINDOWS, LENGTH = 16, 10
"""The first half of the windows is of one domain."""
SETTING = Setting(["a", "b"], lambda token: f"<{token}>", 0, 100)


def trace(*rounds: Any) -> Trace:
    window_R = np.repeat(np.arange(WINDOWS), LENGTH)
    return Trace(
        tokens_R=np.tile(np.arange(LENGTH), WINDOWS),
        window_R=window_R,
        batch_R=window_R // 4,
        domain_W=np.arange(WINDOWS) // 8,
        layers={2: LayerTrace(tuple(x.astype(np.int16) for x in rounds), 0.5, 0.25)},
    )


def described(
    read: Trace, knock_outs: KnockOuts | None = None, history: History | None = None, **config: Any
) -> LayerExperts:
    moe = MoEConfig.model_validate(
        {"num_experts": 4, "gate": {"type": "softmax_topk", "top_k": 1}, **config}
    )
    return describe(2, "attn", moe, read, history, knock_outs, SETTING)


def of_domain() -> np.ndarray[Any, Any]:
    """[R, 1] the first expert for one domain, the second for the other."""
    return np.repeat([0, 1], WINDOWS * LENGTH // 2)[:, None]


def test_a_perfect_specialist() -> None:
    layer = described(trace(of_domain()))
    assert layer.load == [2, 2, 0, 0]
    assert layer.max_vio == 1
    # a batch is of one domain, and that goes to one expert
    assert layer.max_vio_per_batch == 3
    assert layer.effective_experts == pytest.approx(2)
    assert layer.load_entropy == pytest.approx(math.log(2) / math.log(4))
    assert [(one.expert, one.load, one.steps) for one in layer.dead or ()] == [
        (2, 0, None),
        (3, 0, None),
    ]
    found = layer.mutual_information
    assert found is not None
    assert found.value == pytest.approx(1)
    assert found.null_mean is not None
    assert found.null_95 is not None
    assert found.null_mean < 0.15
    assert found.null_95 < 0.4
    assert layer.co_activation is None
    assert layer.knock_out is None
    assert layer.knock_out_note is None
    assert (layer.routing_entropy, layer.top1_margin) == (0.5, 0.25)


def test_a_router_that_looks_at_tokens_alone() -> None:
    window = np.arange(LENGTH) % 4
    layer = described(trace(np.tile(window, WINDOWS)[:, None]))
    found = layer.mutual_information
    assert found is not None
    # all windows are alike: nothing to find, and nothing by chance
    assert (found.value, found.null_mean, found.null_95) == pytest.approx((0, 0, 0))
    assert [one.token for one in layer.top_tokens[1]] == [1, 5, 9]
    # 3 of 10 tokens go there: of a token that always does, 1 / 0.3
    assert [one.lift for one in layer.top_tokens[1]] == pytest.approx([10 / 3] * 3)
    assert layer.top_tokens[1][0].text == "<1>"
    assert layer.top_tokens[1][0].count == WINDOWS


def test_rounds_are_added() -> None:
    rows = WINDOWS * LENGTH
    first = np.tile([0, 1], (rows, 1))
    second = np.tile([0, 2], (rows, 1))
    gate = {"type": "softmax_topk", "top_k": 4}
    layer = described(trace(first, second), gate=gate, exchange={"type": "chain"})
    assert layer.load == [2, 1, 1, 0]
    assert (layer.top_k, layer.rounds) == (4, 2)
    assert layer.co_activation is not None
    assert layer.co_activation[0] == [None, 1, 1, None]


def test_knock_outs_by_domain() -> None:
    tokens_W = np.full(WINDOWS, LENGTH)
    change_EW = np.zeros((4, WINDOWS))
    change_EW[0, :8] = 5.0
    change_EW[1] = np.tile([-1.0, 1.0], 8)
    found = KnockOuts(tokens_W, np.arange(WINDOWS) // 8, {2: change_EW})
    history = History(np.array([5, 9]), np.array([[2.0, 2.0, 0, 0], [2.0, 1.9, 0, 0.1]]))
    layer = described(trace(of_domain()), found, history)
    assert layer.knock_out is not None
    one, other = layer.knock_out
    assert (one.domain, one.change, one.specialisation) == ("a", [0.5, 0, 0, 0], 1)
    assert (one.low[0], one.high[0]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert one.low[1] is not None
    assert one.high[1] is not None
    assert one.low[1] < 0 < one.high[1]
    assert (other.domain, other.change, other.specialisation) == ("b", [0, 0, 0, 0], None)
    assert [(dead.expert, dead.steps) for dead in layer.dead or ()] == [(2, 9), (3, 0)]


def test_what_limits_knock_outs_is_said() -> None:
    empty = KnockOuts(np.full(WINDOWS, LENGTH), np.arange(WINDOWS) // 8, {})
    layer = described(trace(of_domain()), empty, gate={"type": "softmax_topk", "top_k": 4})
    assert layer.knock_out is None
    assert layer.knock_out_note == "a token meets all of the 4 experts it may choose"
    full = empty._replace(change_EW={2: np.zeros((4, WINDOWS))})
    assert described(trace(of_domain()), full, groups={"num_groups": 2}).knock_out_note == (
        CLOSES_GROUP
    )
    # a domain in which nothing is scored has no losses
    unscored = full._replace(tokens_W=np.repeat([LENGTH, 0], 8))
    layer = described(trace(of_domain()), unscored)
    assert layer.knock_out is not None
    assert [row.domain for row in layer.knock_out] == ["a"]
