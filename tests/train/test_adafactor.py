"""Adafactor: torch's own in fp32, and in bf16 an update that rounding does not lose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from valkyrie_core.train.adafactor import Adafactor, round_into


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(5, 7), (3,), (6, 2)]
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_in_fp32_it_is_torchs_own() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    one, other = Adafactor(ours, lr=0.02), torch.optim.Adafactor(theirs, lr=0.02)
    for step in range(4):
        for some, optimizer in ((ours, one), (theirs, other)):
            give_gradients(some, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_in_bf16_state_is_fp32_and_gradients_stay() -> None:
    narrow = parameters(torch.bfloat16)
    optimizer = Adafactor(narrow, lr=0.02)
    give_gradients(narrow, 1)
    kept = [parameter.grad for parameter in narrow]
    optimizer.step()
    for parameter, gradient in zip(narrow, kept, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is gradient
        floating = list(optimizer.state[parameter].values())
        assert floating
        assert all(value.dtype == torch.float32 for value in floating)


def test_what_is_drawn_does_not_depend_on_the_order() -> None:
    together, apart = parameters(torch.bfloat16), parameters(torch.bfloat16)
    one, other = Adafactor(together, lr=0.02), Adafactor(apart, lr=0.02)
    for step in range(3):
        give_gradients(together, step)
        one.step()
        give_gradients(apart, step)
        gradients = [parameter.grad for parameter in apart]
        for parameter in apart:
            parameter.grad = None
        for parameter, gradient in reversed(list(zip(apart, gradients, strict=True))):
            parameter.grad = gradient
            other.step()
            parameter.grad = None
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def rounded(exact: Tensor, seed: int) -> Tensor:
    stored = torch.zeros(exact.shape, dtype=torch.bfloat16)
    round_into(stored, exact, torch.Generator().manual_seed(seed))
    return stored


def test_rounding_keeps_the_mean_and_takes_a_neighbour() -> None:
    exact = torch.tensor([1.0 + 1 / 512, -3.0 - 1 / 100, 1e-3])
    many = torch.stack([rounded(exact, seed).double() for seed in range(4000)])
    # neighbours in bf16 are a 128th of the power of two apart
    gap = 2.0 ** exact.abs().log2().floor() / 128
    assert bool(((many - exact).abs() < gap).all())
    assert bool((many.std(dim=0) > 0).all())
    assert torch.allclose(many.mean(dim=0), exact.double(), atol=float(gap.max()) / 20, rtol=0)
    worst = ((many.mean(dim=0) - exact) / gap).abs().max()
    assert worst < 0.05


def test_rounding_keeps_what_bf16_can_hold() -> None:
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(rounded(exact, 3).float(), exact)


@pytest.mark.parametrize("size", [1, 3, 5, 4097])
def test_rounding_takes_any_size(size: int) -> None:
    exact = torch.linspace(-2, 2, size)
    assert torch.allclose(rounded(exact, 0).float(), exact, rtol=1 / 128, atol=1e-30)


def test_small_updates_are_not_lost() -> None:
    """A thousandth of a weight per step: rounded to nearest, bf16 would never move."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Adafactor([parameter], lr=1e-3)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = 1 - float(parameter.detach().float().mean())
    assert moved == pytest.approx(0.095, abs=0.01)
