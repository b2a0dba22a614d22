"""RWKV-7's native operators equal their slow twins, gradients included, on every ISA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.nn.test_native_wkv import close, needs_native
from tests.nn.test_wkv import documents
from valkyrie_core.kernels import announce, build
from valkyrie_core.kernels import relu_squared as relu_module
from valkyrie_core.kernels import shift_mix as shift_module
from valkyrie_core.kernels import time_mix as time_module
from valkyrie_core.kernels.relu_squared import relu_squared, relu_squared_naive
from valkyrie_core.kernels.shift_mix import LAST, NOTHING, shift_mix, shift_mix_naive
from valkyrie_core.kernels.time_mix import Rows, Vectors, time_mix, time_mix_naive

pytestmark = needs_native


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this processor has, one after the other."""
    monkeypatch.setenv("VALKYRIE_ISA", request.param)
    try:
        return build.isa()
    except build.BuildError as error:
        pytest.skip(str(error))


def gradients(outputs: list[Tensor], inputs: list[Tensor], seed: int = 3) -> list[Tensor]:
    """Of a random weighting of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    total = sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# rows of a window of 70: plain, documents starting inside, padding in front, inside and behind
def sources() -> Tensor:
    plain = list(range(-1, 69))
    starts = [NOTHING if t in (0, 13, 64) else t - 1 for t in range(70)]
    padded = [LAST] * 4 + [3] * 6 + [9, NOTHING, *range(11, 66)] + [65] * 3
    return torch.tensor([plain, starts, padded], dtype=torch.int32)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("D", [4, 24, 80])
def test_shift_mix_equals_its_twin(isa: str, count: int, D: int) -> None:
    tensors = [random(3, 70, D, seed=1), random(3, D, seed=2), *random(count, D, seed=4)]
    results = []
    for function, dtype in ((shift_mix_naive, torch.float64), (shift_mix, torch.float32)):
        x, last, *mixes = (tensor.to(dtype).requires_grad_() for tensor in tensors)
        ys = list(function(x, last, sources(), tuple(mixes)))
        results.append([*ys, *gradients(ys, [x, last, *mixes])])
    for want, got in zip(*results, strict=True):
        assert got.dtype == torch.float32
        close(got, want, 1e-5)


def test_shift_mix_under_autocast_gives_what_matrices_want(isa: str) -> None:
    x, last = random(3, 70, 24, seed=1).float(), random(3, 24, seed=2).float()
    mixes = tuple(random(6, 24, seed=4).float())
    want = shift_mix_naive(x, last, sources(), mixes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = shift_mix(x.requires_grad_(), last, sources(), mixes)
    assert {y.dtype for y in got} == {torch.bfloat16}
    for a, b in zip(got, want, strict=True):
        close(a, b.double(), 4e-3)
    (dx,) = torch.autograd.grad(sum(y.sum() for y in got[:2]), x)
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("count", [1, 16, 4099])
def test_relu_squared_equals_its_twin(isa: str, count: int) -> None:
    x = random(count, seed=5)
    x[0] = 0.0
    results = []
    for function, dtype in ((relu_squared_naive, torch.float64), (relu_squared, torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf)
        results.append([y, *gradients([y], [leaf])])
    for want, got in zip(*results, strict=True):
        close(got, want, 1e-6)
    assert torch.isnan(relu_squared(torch.full((20,), torch.nan))).all()


def problem(
    B: int, T: int, N: int, H: int, *, first: bool, dtype: torch.dtype
) -> tuple[Rows, Vectors, Tensor]:
    D = N * H
    r, k, v, decay, rate, share, v_first, gate = (random(B, T, D, seed=s) for s in range(8))
    w0, a0, v0, k_k, k_a, r_k, weight, bias = (random(D, seed=20 + s) for s in range(8))
    state = random(B, N, H, H, seed=40)

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    rows = Rows(
        *(leaf(x) for x in (r, k, v, decay, rate)),
        None if first else leaf(share),
        None if first else leaf(v_first),
        leaf(gate),
    )
    vectors = Vectors(
        *(leaf(w0), leaf(a0), None if first else leaf(v0)),
        *(leaf(x) for x in (k_k, k_a, r_k, weight, bias)),
    )
    return rows, vectors, leaf(state)


def run(
    function: Callable[..., tuple[Tensor, Tensor]],
    sizes: tuple[int, int, int, int],
    doc: Tensor | None,
    *,
    first: bool,
    dtype: torch.dtype,
    signed: bool = False,
) -> list[Tensor]:
    """The outputs, and the gradients of all that goes in."""
    rows, vectors, state = problem(*sizes, first=first, dtype=dtype)
    outputs = list(function(rows, vectors, state, doc, signed=signed))
    inputs = [x for x in (*rows, *vectors, state) if x is not None]
    return [*outputs, *gradients(outputs, inputs)]


@pytest.mark.parametrize("H", [4, 8, 16, 48, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_time_mix_equals_its_twin(
    isa: str, H: int, packed: bool, first: bool, signed: bool
) -> None:
    sizes = (2, 75, 2, H)
    doc = documents(2, 75) if packed else None
    exact = run(time_mix_naive, sizes, doc, first=first, dtype=torch.float64, signed=signed)
    single = run(time_mix, sizes, doc, first=first, dtype=torch.float32, signed=signed)
    for want, got in zip(exact, single, strict=True):
        assert got.dtype == torch.float32
        close(got, want, 2e-5)


def test_time_mix_of_keys_that_are_zero_is_finite() -> None:
    rows, vectors, state = problem(1, 5, 2, 8, first=True, dtype=torch.float32)
    rows = rows._replace(k=torch.zeros_like(rows.k).requires_grad_())
    z, _ = time_mix(rows, vectors, state, None)
    twin, _ = time_mix_naive(rows, vectors, state, None)
    close(z, twin.double(), 1e-5)
    (dk,) = torch.autograd.grad(z.sum(), rows.k)
    assert torch.isfinite(dk).all()


def test_time_mix_in_bf16_is_near_its_twin() -> None:
    sizes = (2, 40, 2, 16)
    exact = run(time_mix_naive, sizes, None, first=False, dtype=torch.float64)
    half = run(time_mix, sizes, None, first=False, dtype=torch.bfloat16)
    for want, got in zip(exact, half, strict=True):
        close(got, want, 0.1)
        assert F.cosine_similarity(got.double().flatten(), want.flatten(), dim=0) > 0.999


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, last = random(3, 70, 24, seed=1).float(), random(3, 24, seed=2).float()
            mixes = [mix.float().requires_grad_() for mix in random(6, 24, seed=4)]
            ys = list(shift_mix(x, last, sources(), tuple(mixes)))
            mixed = run(time_mix, (3, 150, 2, 8), None, first=False, dtype=torch.float32)
            results.append([*ys, *gradients(ys, mixes), *mixed])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_operators_are_well_formed() -> None:
    x, last = torch.randn(3, 70, 8), torch.randn(3, 8)
    checked = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [tensor.requires_grad_() for tensor in (x, last, torch.randn(6, 8))]
    torch.library.opcheck(
        shift_module._op,
        (leaves[0], leaves[1], sources(), leaves[2], torch.bfloat16),
        test_utils=checked,
    )
    torch.library.opcheck(relu_module._op, (torch.randn(5, requires_grad=True),))
    for first in (False, True):
        rows, vectors, state = problem(1, 5, 2, 8, first=first, dtype=torch.float32)
        flags = torch.tensor([[0, 1, 2, 0, 0]], dtype=torch.uint8)
        arguments = (*rows, *vectors, state, flags, 8, not first, True)
        torch.library.opcheck(time_module._op, arguments, test_utils=checked)


def test_flops_of_the_recurrence_are_counted() -> None:
    rows, vectors, state = problem(2, 7, 3, 8, first=False, dtype=torch.float32)
    with FlopCounterMode(display=False) as forward:
        z, _ = time_mix(rows, vectors, state, None)
    with FlopCounterMode(display=False) as back:
        z.sum().backward()
    assert forward.get_total_flops() == 9 * 2 * 7 * 3 * 64
    assert back.get_total_flops() == 27 * 2 * 7 * 3 * 64


def test_without_native_code_the_twins_serve_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VALKYRIE_NATIVE", "0")
    monkeypatch.setattr(announce, "_announced", set())
    x, last = torch.randn(3, 70, 8), torch.randn(3, 8)
    for _ in range(2):
        shift_mix(x, last, sources(), (torch.randn(8),))
        relu_squared(x)
        time_mix(*problem(1, 5, 2, 8, first=True, dtype=torch.float32), None)
    said = [record.message for record in caplog.records if "slower" in record.message]
    assert len([line for line in said if "token shift" in line]) == 1
    assert len([line for line in said if "squared ReLU" in line]) == 1
