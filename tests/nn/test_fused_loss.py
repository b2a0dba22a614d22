"""The loss that makes its gradients at once equals the one that autograd differentiates."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.nn.menu import CONFIGS, hybrid_config
from valkyrie_core.kernels import announce, build, loss
from valkyrie_core.kernels.loss import linear_cross_entropy
from valkyrie_core.nn.model import HybridLM


def reason() -> str | None:
    try:
        build.library("loss")
    except build.BuildError as error:
        return str(error)
    return None


needs_native = pytest.mark.skipif(reason() is not None, reason=str(reason()))


def problem(R: int, V: int, D: int, scale: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(R + V)
    y_R = torch.randint(0, V, (R,))
    y_R[1::3] = -100
    return torch.randn(R, D) * scale, torch.randn(V, D), y_R


def twin(x_RD: Tensor, weight_VD: Tensor, y_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in fp64."""
    x, w = x_RD.double().requires_grad_(), weight_VD.double().requires_grad_()
    nats = F.cross_entropy(x @ w.t(), y_R, ignore_index=-100, reduction="sum")
    return (nats.detach(), *torch.autograd.grad(0.37 * nats, [x, w]))


def fused(x_RD: Tensor, weight_VD: Tensor, y_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x_RD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    nats = linear_cross_entropy(x, w, y_R)
    return (nats.detach(), *torch.autograd.grad(0.37 * nats, [x, w]))


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.double() - want).abs().max() / want.abs().max())
    assert error < tolerance, error


@needs_native
@pytest.mark.parametrize(("R", "V", "D"), [(1, 2, 4), (7, 23, 16), (50, 64, 8), (300, 1003, 5)])
def test_fp32_equals_the_twin(R: int, V: int, D: int) -> None:
    case = problem(R, V, D)
    for got, want in zip(fused(*case), twin(*case), strict=True):
        assert got.dtype == torch.float32
        close(got, want, 1e-5)


@needs_native
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(37, 23, 16)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 23 * 4 * 5)
    for got, want in zip(fused(*case), twin(*case), strict=True):
        close(got, want, 1e-5)


@needs_native
def test_autocast_computes_in_bf16_and_sums_in_fp32() -> None:
    x, w, y = problem(90, 211, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats, dx, dw = fused(x, w, y)
    rounded = (x.bfloat16(), w.bfloat16(), y)
    assert (nats.dtype, dx.dtype, dw.dtype) == (torch.float32,) * 3
    for got, want in zip((nats, dx, dw), twin(*rounded), strict=True):
        close(got, want, 1e-2)


@needs_native
def test_far_logits_overflow_nothing() -> None:
    x, w, y = problem(9, 40, 16, scale=200.0)
    for got, want in zip(fused(x, w, y), twin(x, w, y), strict=True):
        assert torch.isfinite(got).all()
        close(got, want, 1e-4)


@needs_native
def test_nothing_scored_costs_nothing() -> None:
    x, w, y = problem(5, 11, 4)
    nats, dx, dw = fused(x, w, torch.full_like(y, -100))
    assert nats == 0
    assert not dx.any()
    assert not dw.any()


@needs_native
@pytest.mark.parametrize("target", [-1, 11])
def test_a_target_outside_of_the_vocabulary_is_refused(target: int) -> None:
    x, w, y = problem(5, 11, 4)
    y[2] = target
    with pytest.raises(IndexError, match=r"0\.\.10"):
        fused(x, w, y)


@needs_native
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    x, w, y = problem(6, 11, 4)
    _, dx, dw = fused(x, w, y)
    x.requires_grad_(frozen != "x")
    w.requires_grad_(frozen != "weight")
    (0.37 * linear_cross_entropy(x, w, y)).backward()  # type: ignore[no-untyped-call]
    assert (x.grad is None, w.grad is None) == (frozen == "x", frozen == "weight")
    got, want = (w.grad, dw) if frozen == "x" else (x.grad, dx)
    assert got is not None
    assert torch.equal(got, want)


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    logits = torch.randn(33, 57)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own, nats = logits.clone(), torch.empty(33)
            loss._softmax_less_onehot(own, torch.arange(33), nats)
            results.append((own, nats))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@needs_native
def test_torch_knows_the_operator() -> None:
    x, w, y = problem(6, 11, 4)
    args = (x.requires_grad_(), w.requires_grad_(), y, torch.float32, True, True)
    torch.library.opcheck(torch.ops.valkyrie.linear_cross_entropy.default, args)


@needs_native
def test_flops_are_counted_without_recomputing() -> None:
    x, w, y = problem(6, 11, 4)
    with FlopCounterMode(display=False) as counter:
        fused(x, w, y)
    assert counter.get_total_flops() == 3 * 2 * 6 * 11 * 4


@needs_native
@pytest.mark.parametrize("name", ["hybrid", "tied"])
def test_a_model_has_the_same_gradients_either_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model = HybridLM(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    twin_model = copy.deepcopy(model)
    x, y = torch.randint(0, 23, (2, 2, 19))
    y[:, :5] = -100
    used = []
    monkeypatch.setattr(
        "valkyrie_core.nn.model.linear_cross_entropy",
        lambda *args: used.append(1) or linear_cross_entropy(*args),  # type: ignore[func-returns-value]
    )
    fast, _, _ = model.loss(x, y, model.init_state(2))
    assert used
    monkeypatch.setattr("valkyrie_core.nn.model.fused_serves", lambda *args: False)
    slow, _, _ = twin_model.loss(x, y, twin_model.init_state(2))
    torch.testing.assert_close(fast, slow)
    fast.backward()  # type: ignore[no-untyped-call]
    slow.backward()  # type: ignore[no-untyped-call]
    for (key, a), b in zip(model.named_parameters(), twin_model.parameters(), strict=True):
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad
            continue
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_the_twin_serves_without_native_code_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VALKYRIE_NATIVE", "0")
    monkeypatch.setattr(announce, "_announced", set())
    model = HybridLM(hybrid_config("a"))
    x, y = torch.randint(0, 23, (2, 2, 9))
    with caplog.at_level(logging.WARNING, "valkyrie"):
        for _ in range(2):
            loss_now, _, _ = model.loss(x, y, model.init_state(2))
            loss_now.backward()  # type: ignore[no-untyped-call]
    said = [r for r in caplog.records if r.getMessage().startswith("the loss runs as PyTorch")]
    assert len(said) == 1


def test_fp64_takes_the_twin() -> None:
    x, w, _ = (t.double() for t in problem(6, 11, 4))
    assert not loss.fused_serves(x.requires_grad_(), w.requires_grad_())


def test_without_gradients_the_twin_serves() -> None:
    x, w, _ = problem(6, 11, 4)
    assert not loss.fused_serves(x, w)
    with torch.no_grad():
        assert not loss.fused_serves(x.requires_grad_(), w)
