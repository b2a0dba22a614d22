"""Adafactor: torch's own in fp32, and in bf16 an update that rounding does not lose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from valkyrie_core.kernels import adafactor as kernel
from valkyrie_core.train.adafactor import Adafactor


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
    kernel.round_into(stored, exact, seed)
    return stored


def test_rounding_keeps_the_mean_and_takes_a_neighbour() -> None:
    exact = torch.tensor([1.0 + 1 / 512, -3.0 - 1 / 100, 1e-3])
    many = torch.stack([rounded(exact, seed).double() for seed in range(4000)])
    # neighbours in bf16 are a 128th of the power of two apart
    gap = 2.0 ** exact.abs().log2().floor() / 128
    assert bool(((many - exact).abs() < gap).all())
    assert bool((many.std(dim=0) > 0).all())
    worst = ((many.mean(dim=0) - exact) / gap).abs().max()
    assert worst < 0.05


def test_draws_of_neighbouring_seeds_and_places_are_unrelated() -> None:
    exact = torch.full((4096,), 1.0 + 1 / 256)
    up = torch.stack([rounded(exact, seed).double() > 1 for seed in range(16)]).double()
    assert up.mean() == pytest.approx(0.5, abs=0.01)
    related = torch.corrcoef(up) - torch.eye(16)
    assert related.abs().max() < 0.08
    for shift in (1, 2, 64):
        pairs = torch.stack([up[0, :-shift], up[0, shift:]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.08


def test_elements_draw_by_themselves_over_steps() -> None:
    """Were a step only xored into a place, a block of places would share its draws."""
    exact = torch.full((256,), 1.0 + 0.3 / 128)
    ups = sum((rounded(exact, (3 << 32) + step).double() > 1).double() for step in range(256, 512))
    assert isinstance(ups, Tensor)
    assert ups.mean() == pytest.approx(0.3 * 256, rel=0.05)
    # binomial: sqrt(256 * 0.3 * 0.7) = 7.3
    assert 5 < ups.std() < 10


def test_rounding_keeps_what_bf16_can_hold() -> None:
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(rounded(exact, 3).float(), exact)


@pytest.mark.parametrize("size", [1, 3, 5, 4097])
def test_rounding_takes_any_size(size: int) -> None:
    exact = torch.linspace(-2, 2, size)
    assert torch.allclose(rounded(exact, 0).float(), exact, rtol=1 / 128, atol=1e-30)


def test_rounding_in_pieces_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.randn(1000)
    whole = rounded(exact, 7)
    monkeypatch.setattr(kernel, "AT_ONCE", 64)
    assert torch.equal(rounded(exact, 7), whole)


SHAPES = [(1, 1), (5, 7), (64, 16), (130, 33), (65, 512)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_native_update_equals_its_twin(
    shape: tuple[int, int], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    start = (0.02 * torch.randn(shape)).bfloat16()
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(kernel, "serves", lambda _weight: False)
        elif not kernel.serves(nn.Parameter(start)):
            pytest.skip("no native code here")
        parameter = nn.Parameter(start.clone())
        optimizer = Adafactor(
            [{"params": [parameter], "weight_decay": 0.1}], lr=0.02, eps=(None, 1e-2)
        )
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            gradient = scale * torch.randn(shape, generator=generator)
            parameter.grad = gradient.bfloat16()
            optimizer.step()
        found.append((parameter.detach(), optimizer.state[parameter]))
    (one, state), (other, twin) = found
    for name in ("row_var", "col_var", "step"):
        torch.testing.assert_close(state[name], twin[name], rtol=1e-4, atol=0)
    # sums in another order may round to the other neighbour, now and then
    differs = (one != other).double().mean()
    assert differs < 0.02
    torch.testing.assert_close(one.float(), other.float(), rtol=2 / 128, atol=1e-4)


def test_the_native_update_does_not_depend_on_threads() -> None:
    if not kernel.serves(nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))):
        pytest.skip("no native code here")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            parameter = nn.Parameter(torch.randn(200, 70).bfloat16())
            optimizer = Adafactor([parameter], lr=0.02)
            parameter.grad = torch.randn(200, 70).bfloat16()
            optimizer.step()
            found.append(parameter.detach())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_wrong_shapes_are_refused() -> None:
    weight = torch.zeros(4, 3, dtype=torch.bfloat16)
    if not kernel.serves(weight):
        pytest.skip("no native code here")
    settings = {
        "rate": 0.1,
        "share": 1.0,
        "epsilon": 1e-7,
        "least_scale": 1e-2,
        "d": 1.0,
        "decay": 0.0,
        "seed": 0,
    }
    rows, columns = torch.zeros(4, 1), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="the gradient is"):
        kernel.adafactor_(weight, weight[:2], rows, columns, **settings)
    with pytest.raises(ValueError, match="columns' variances"):
        kernel.adafactor_(weight, weight, rows, rows, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 40_000])
def test_norms(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert kernel.norm(x) == pytest.approx(float(x.double().norm()), rel=1e-5)
    assert math.isnan(kernel.norm(torch.tensor([1.0, float("nan")]).to(dtype)))


def test_small_updates_are_not_lost() -> None:
    """A thousandth of a weight per step: rounded to nearest, bf16 would never move."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Adafactor([parameter], lr=1e-3)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = 1 - float(parameter.detach().float().mean())
    assert moved == pytest.approx(0.095, abs=0.01)
