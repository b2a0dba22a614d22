"""RWKV-7 at several scales: half-lives as they are named, strides equal to their slow twin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.nn.menu import RWKV
from valkyrie_core.kernels.time_mix import DECAY_SCALE
from valkyrie_core.nn.hierarchical import BandedRWKV7, HierarchicalConfig, StridedRWKV7
from valkyrie_core.nn.state import Ctx

DIM = 16


def built(scales: dict[str, Any], layer_idx: int = 0, num_layers: int = 3) -> Any:
    torch.manual_seed(0)
    config = HierarchicalConfig.model_validate({"inner": RWKV, "scales": scales})
    mixer = config.build(DIM, layer_idx=layer_idx, num_layers=num_layers).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
            elif not name.endswith("w0"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def half_lives(mixer: BandedRWKV7, row: float) -> Tensor:
    """In tokens, where the low-rank map adds `row`."""
    row_D = torch.full((DIM,), row, dtype=torch.float64)
    rate_D = (mixer.w0 + mixer.decay_rows(row_D)).sigmoid()
    return math.log(2) / (DECAY_SCALE * rate_D)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_half_lives_are_spread_and_bounded_by_depth(layer: int) -> None:
    scales = {"type": "bands", "shortest": 2, "longest": 512, "bound": 0.5}
    mixer = built(scales, layer)
    named = 2 * (512 / 2) ** (torch.arange(DIM, dtype=torch.float64) / (DIM - 1))
    # the bias is kept in fp32
    torch.testing.assert_close(half_lives(mixer, 0.0), named, rtol=1e-5, atol=0)
    fastest = half_lives(mixer, 60.0)
    bound = (named * 0.5 * layer / 2).clamp(min=math.log(2) / DECAY_SCALE)
    torch.testing.assert_close(fastest, bound, rtol=1e-5, atol=0)
    # it may always remember for longer
    assert (half_lives(mixer, -9.0) > 100 * named).all()


def test_without_bounds_it_is_rwkv7_with_another_bias() -> None:
    mixer = built({"type": "bands", "bound": 0}, layer_idx=2)
    row_BTD = torch.randn(2, 5, DIM, dtype=torch.float64) * 30
    assert torch.equal(mixer.decay_rows(row_BTD), row_BTD)


@pytest.mark.parametrize("layer", [1, 2])
def test_gradients_of_bounded_decays_are_finite(layer: int) -> None:
    # of the last layer all channels are bounded, of the one before some
    mixer = built({"type": "bands", "bound": 0.9}, layer_idx=layer).float()
    row_BTD = torch.tensor([-80.0, -5.0, 0.0, 5.0, 80.0])[:, None].expand(5, DIM)
    row_BTD = row_BTD.clone().requires_grad_()
    mixer.decay_rows(row_BTD).sum().backward()
    assert row_BTD.grad is not None
    assert row_BTD.grad.isfinite().all()
    assert mixer.w0.grad is not None
    assert mixer.w0.grad.isfinite().all()


@pytest.mark.parametrize("strides", [(1, 4), (2, 3, 8)])
def test_strides_are_mixers_over_means_of_complete_groups(strides: tuple[int, ...]) -> None:
    mixer = built({"type": "strides", "strides": strides}, layer_idx=1)
    assert isinstance(mixer, StridedRWKV7)
    T = 22
    x_BTD = torch.randn(2, T, DIM, dtype=torch.float64)
    pos_BT = torch.arange(T).expand(2, T)
    cpu = torch.device("cpu")
    state = mixer.init_state(2, device=cpu, dtype=torch.float64)
    y_BTD, _, _ = mixer(x_BTD, state, Ctx(pos_BT, torch.zeros_like(pos_BT)))
    expected = torch.zeros_like(x_BTD)
    for stride, inner in zip(strides, mixer.each, strict=True):
        whole = T // stride
        mean_BGD = x_BTD[:, : whole * stride].unflatten(1, (whole, stride)).mean(2)
        own = inner.init_state(2, device=cpu, dtype=torch.float64)
        ctx = Ctx(pos_BT[:, :whole], torch.zeros_like(pos_BT[:, :whole]))
        y_BGD, _, _ = inner(mean_BGD, own, ctx)
        for t in range(stride - 1, T):
            expected[:, t] += y_BGD[:, (t + 1) // stride - 1]
    torch.testing.assert_close(y_BTD, expected)


def test_a_token_that_completes_no_group_costs_no_recurrence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixer = built({"type": "strides", "strides": [2, 8]})
    calls: list[int] = []
    for stride, inner in zip(mixer.strides, mixer.each, strict=True):
        inner.register_forward_pre_hook(lambda *_, stride=stride: calls.append(stride))
    state = mixer.init_state(1, device=torch.device("cpu"), dtype=torch.float64)
    for t in range(16):
        pos = torch.tensor([[t]])
        x = torch.randn(1, 1, DIM, dtype=torch.float64)
        _, state, _ = mixer(x, state, Ctx(pos, torch.zeros_like(pos)))
    assert calls.count(2) == 8
    assert calls.count(8) == 2


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ({"type": "bands", "shortest": 1}, "greater than 1.14"),
        ({"type": "bands", "shortest": 64, "longest": 32}, "longest must be above shortest"),
        ({"type": "strides", "strides": [4, 1]}, "rise"),
        ({"type": "strides", "strides": [0, 2]}, "from 1 on"),
        ({"type": "strides", "strides": [4]}, "at least 2"),
    ],
)
def test_scales_that_are_none(scales: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HierarchicalConfig.model_validate({"scales": scales})
