"""WKV-7: every form equals the per-token twin, outputs and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference import rwkv7 as twin
from valkyrie_core.kernels import wkv7, wkv7_chunked, wkv7_naive


def inputs(
    B: int, T: int, N: int, H: int, *, correlated: float = 0.0, decay: str = "mixed", seed: int = 0
) -> list[Tensor]:
    """r, log_decay, k, v, a, b in fp64; correlated keys are where a Neumann inverse fails."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    kk = F.normalize(normal(B, T, N, H) + correlated * normal(1, 1, N, H), dim=-1)
    log_decay = {
        "mixed": -0.6066 * torch.sigmoid(3 * normal(B, T, N, H)),
        "floor": torch.full((B, T, N, H), -0.6066, dtype=torch.float64),
        "none": torch.zeros(B, T, N, H, dtype=torch.float64),
    }[decay]
    rate = torch.sigmoid(normal(B, T, N, H) + 1)
    return [normal(B, T, N, H), log_decay, normal(B, T, N, H), normal(B, T, N, H), -kk, kk * rate]


def documents(B: int, T: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    doc = (torch.rand(B, T, generator=g) < 0.15).long().cumsum(1)
    return doc.masked_fill(torch.rand(B, T, generator=g) < 0.15, -1)


def everything(
    form: object, xs: list[Tensor], state: Tensor, doc: Tensor | None
) -> tuple[Tensor, ...]:
    """Output, final state and all gradients of a fixed random projection of both."""
    leaves = [x.clone().requires_grad_() for x in (*xs, state)]
    y, final = form(*leaves, doc)  # type: ignore[operator]
    g = torch.Generator().manual_seed(9)
    wy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    ws = torch.randn(final.shape, generator=g, dtype=torch.float64).to(final.dtype)
    grads = torch.autograd.grad((y * wy).sum() + (final * ws).sum(), leaves)
    return (y.detach(), final.detach(), *grads)


@pytest.mark.parametrize("T", [1, 5, 31, 32, 33, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_naive_in_fp64(T: int, packed: bool) -> None:
    xs = inputs(2, T, 3, 8)
    state = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    doc = documents(2, T) if packed else None
    slow = everything(wkv7_naive, xs, state, doc)
    fast = everything(wkv7_chunked, xs, state, doc)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("correlated", [0.0, 3.0])
@pytest.mark.parametrize("decay", ["mixed", "floor", "none"])
@pytest.mark.parametrize("H", [4, 16, 64])
def test_fp32_stays_within_1e_5_of_fp64(correlated: float, decay: str, H: int) -> None:
    xs = inputs(1, 77, 2, H, correlated=correlated, decay=decay)
    state = torch.randn(1, 2, H, H, dtype=torch.float64)
    exact = everything(wkv7_naive, xs, state, None)
    single = everything(wkv7, [x.float() for x in xs], state.float(), None)
    for a, b in zip(exact, single, strict=True):
        assert float((b.double() - a).abs().max() / a.abs().max()) < 1e-5


def test_naive_equals_the_numpy_twin() -> None:
    xs = inputs(1, 9, 1, 5)
    state = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    y, final = wkv7_naive(*xs, state)  # type: ignore[arg-type]
    want_y, want_final = twin.wkv7(*(x[0, :, 0].numpy() for x in xs), state[0, 0].numpy())
    np.testing.assert_allclose(y[0, :, 0].numpy(), want_y, rtol=1e-12)
    np.testing.assert_allclose(final[0, 0].numpy(), want_final, rtol=1e-12)


@pytest.mark.parametrize("forms", [(wkv7_naive, wkv7_chunked), (wkv7_chunked, wkv7_naive)])
def test_a_state_can_be_handed_from_one_form_to_another(forms: tuple[object, object]) -> None:
    xs = inputs(2, 50, 2, 8)
    whole, final = wkv7_naive(*xs)  # type: ignore[call-arg, misc]
    first, middle = forms[0](*(x[:, :21] for x in xs))  # type: ignore[operator]
    second, last = forms[1](*(x[:, 21:] for x in xs), middle)  # type: ignore[operator]
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(last, final)


def test_the_state_is_value_by_key() -> None:
    # squares hide a transpose: one write must come back as v when read with k
    one = torch.zeros(6, 1, 1, 1, 4, dtype=torch.float64)
    r, log_decay, k, v, a, b = one
    k[..., 1], v[..., 2], r[..., 1] = 1.0, 5.0, 1.0
    for form in (wkv7_naive, wkv7_chunked, wkv7):
        y, state = form(r, log_decay, k, v, a, b)
        assert y.flatten().tolist() == [0, 0, 5, 0]
        assert float(state[0, 0, 2, 1]) == 5


def test_decay_that_would_overflow_is_refused() -> None:
    xs = inputs(1, 3, 1, 4)
    xs[1] = torch.full_like(xs[1], -1.5)
    with pytest.raises(ValueError, match=r"within \[-1, 0\], not \[-1.5, -1.5\]"):
        wkv7(*xs)  # type: ignore[call-arg, misc]


def test_padding_is_an_identity() -> None:
    xs = inputs(1, 6, 1, 4)
    state = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    for form in (wkv7_naive, wkv7_chunked):
        y, final = form(*xs, state, torch.full((1, 6), -1))
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(final, state)
