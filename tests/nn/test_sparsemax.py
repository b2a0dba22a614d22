"""Sparsemax against the quadratic program that it solves, and its gradient."""

from __future__ import annotations

import pytest
import torch

from valkyrie_core.nn.sparsemax import sparsemax


def nearest_on_the_simplex(x: torch.Tensor) -> torch.Tensor:
    """By bisection for tau: sum of max(x - tau, 0) falls with it."""
    low, high = x.amax(-1, keepdim=True) - 1, x.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        too_much = (x - tau).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    return (x - high).clamp(min=0)


def scores(*shape: int, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 7, 300])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_it_is_the_nearest_point(size: int, scale: float) -> None:
    x = scores(40, size, scale=scale)
    p = sparsemax(x)
    torch.testing.assert_close(p, nearest_on_the_simplex(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(p.sum(-1), torch.ones(40, dtype=torch.float64))
    # no direction inside the simplex leads nearer (the optimality condition of the program)
    slack = (x - p).amax(-1, keepdim=True) - (x - p)
    assert float((p * slack).abs().max()) < 1e-12


def test_zeros_are_exact_and_hidden_scores_stay_hidden() -> None:
    x = scores(50, 30, scale=3.0).float()
    x[:, ::3] = -torch.inf
    x[0] = -torch.inf
    x[0, 5] = -7.0
    p = sparsemax(x)
    assert (p[:, ::3] == 0).all()
    assert p[0].tolist() == [float(i == 5) for i in range(30)]
    assert float((p == 0).float().mean()) > 0.7
    torch.testing.assert_close(p.sum(-1), torch.ones(50))
    ties = sparsemax(torch.tensor([[2.0, 2.0, -1.0]]))
    assert ties.tolist() == [[0.5, 0.5, 0.0]]


def test_its_gradient_is_the_jacobian() -> None:
    x = scores(6, 9, scale=1.5).requires_grad_()
    assert torch.autograd.gradcheck(sparsemax, (x,))
    p = sparsemax(x)
    row = torch.autograd.functional.jacobian(lambda one: sparsemax(one), x[0].detach())
    s = (p[0] > 0).double()
    expected = torch.diag(s) - torch.outer(s, s) / s.sum()
    torch.testing.assert_close(row, expected)
    hidden = x.detach().masked_fill(torch.arange(9) > 4, -torch.inf).requires_grad_()
    (dx,) = torch.autograd.grad((sparsemax(hidden) * scores(6, 9, scale=1.0, seed=2)).sum(), hidden)
    assert (dx[:, 5:] == 0).all()
    assert dx.isfinite().all()


def test_bf16_is_computed_wide() -> None:
    x = scores(20, 50, scale=2.0).bfloat16()
    assert sparsemax(x).dtype == torch.bfloat16
    torch.testing.assert_close(sparsemax(x), sparsemax(x.double()).bfloat16())
