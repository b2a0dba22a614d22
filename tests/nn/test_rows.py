"""Rows of tokens to rows of experts and back: the native passes equal PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from valkyrie_core.kernels import build, rows

ISAS = ["avx512", "avx2", "portable"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Native code for one instruction set after the other."""
    monkeypatch.setenv("VALKYRIE_ISA", request.param)
    try:
        build.library("rows")
    except build.BuildError as error:
        pytest.skip(str(error))
    return str(request.param)


def places(R: int, K: int, used: float) -> tuple[Tensor, int]:
    """Every slot somewhere, some of them nowhere; and how many entries there are."""
    draw = torch.Generator().manual_seed(R * K)
    used_RK = torch.rand(R, K, generator=draw) < used
    count = int(used_RK.sum())
    places_RK = torch.full((R, K), -1)
    places_RK[used_RK] = torch.randperm(count, generator=draw)
    return places_RK, count


CASES = [
    (R, K, D, used) for R, K in ((1, 1), (7, 3), (40, 2)) for D in (1, 7, 48) for used in (1.0, 0.6)
]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("R", "K", "D", "used"), CASES)
def test_native_passes_equal_the_formulas(
    isa: str, R: int, K: int, D: int, used: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    places_RK, M = places(R, K, used)
    weights_RK = torch.rand(R, K)
    x_RD, y_MD = torch.randn(R, D).to(dtype), torch.randn(M, D).to(dtype)

    def results(x: Tensor, weights: Tensor, y: Tensor) -> list[Tensor]:
        leaves = [one.detach().clone().requires_grad_() for one in (x, weights, y)]
        spread_MD = rows.spread(leaves[0], places_RK, M)
        blend_RD = rows.blend(leaves[2], leaves[1], places_RK)
        # gradients that differ from number to number
        loss = (spread_MD * y.detach()).sum() + (blend_RD * x.detach()).sum()
        grads = torch.autograd.grad(loss, leaves)
        return [spread_MD.detach(), blend_RD.detach(), *grads]

    found = results(x_RD, weights_RK, y_MD)
    # double precision goes by PyTorch
    exact = results(x_RD.double(), weights_RK.double(), y_MD.double())
    assert [one.dtype for one in found] == [dtype, dtype, dtype, torch.float32, dtype]
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        assert not one.numel() or float((one.double() - other).abs().max()) <= LIMITS[dtype] * scale


def test_gradients_of_the_formulas() -> None:
    places_RK, M = places(5, 3, 0.7)
    x_RD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights_RK = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)

    def through(x: Tensor, weights: Tensor) -> Tensor:
        return rows.blend(rows.spread(x, places_RK, M).square(), weights, places_RK)

    assert torch.autograd.gradcheck(through, (x_RD, weights_RK))


def test_torch_knows_the_operators(isa: str) -> None:
    places_RK, M = places(6, 2, 0.8)
    x_RD, y_MD = torch.randn(6, 5, requires_grad=True), torch.randn(M, 5, requires_grad=True)
    weights_RK = torch.rand(6, 2, requires_grad=True)
    ops = torch.ops.valkyrie
    torch.library.opcheck(ops.rows_spread.default, (x_RD, places_RK, M))
    torch.library.opcheck(ops.rows_blend.default, (y_MD, weights_RK, places_RK))


def test_all_threads_agree() -> None:
    places_RK, M = places(300, 3, 0.7)
    y_MD, weights_RK = torch.randn(M, 33), torch.rand(300, 3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(rows.blend(y_MD, weights_RK, places_RK))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)
