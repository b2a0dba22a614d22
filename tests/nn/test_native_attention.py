"""Native attention, norms with positions, and the gate of SwiGLU equal their slow twins."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.nn.menu import hybrid_config, model_config
from tests.nn.test_laws import DOCS
from valkyrie_core.kernels import announce, attention, build
from valkyrie_core.kernels.attention import blocked_attention
from valkyrie_core.kernels.gated import silu_times, silu_times_naive
from valkyrie_core.kernels.norm_rope import norm_rope
from valkyrie_core.nn.kv_cache import PADDING
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.position import Angles, RopeConfig, rope_angles, rotation, turn


def reason() -> str | None:
    try:
        for source in ("attention", "norm_rope", "gated"):
            build.library(source)
    except build.BuildError as error:
        return str(error)
    return None


needs_native = pytest.mark.skipif(reason() is not None, reason=str(reason()))
SHAPES = [
    (1, 1, 1, 1, 4),
    (2, 37, 4, 2, 8),
    (1, 64, 2, 2, 64),
    (2, 130, 3, 3, 48),
    (1, 200, 4, 1, 7),
]
BF16 = 1.2e-2
"""What rounding probabilities, gradients and results to bf16 costs, relative to the largest."""


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.double() - want.double()).abs().max())
    assert error <= tolerance * float(want.abs().max()) + 1e-9, error


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, *rest: object
) -> list[Tensor]:
    """What the function gives, and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves, *rest)
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return [y.detach(), *grads]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, segment_BT: Tensor | None) -> Tensor:
    """The formula, with the whole matrix."""
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    seen = torch.ones(T, T, dtype=torch.bool).tril()[None]
    if segment_BT is not None:
        same = segment_BT[:, :, None] == segment_BT[:, None, :]
        seen = (seen & same & (segment_BT != PADDING)[:, :, None]) | torch.eye(T, dtype=torch.bool)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attention_case(
    shape: tuple[int, int, int, int, int], packed: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    B, T, N, K, H = shape
    torch.manual_seed(T)
    xs = [torch.randn(B, T, heads, H).bfloat16() for heads in (N, K, K)]
    segment_BT = None
    if packed:
        segment_BT = (torch.rand(B, T) < 0.04).cumsum(1)
        segment_BT[torch.rand(B, T) < 0.1] = PADDING
    return xs, torch.randn(B, T, N, H).bfloat16(), segment_BT


@needs_native
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_formula(
    shape: tuple[int, int, int, int, int], packed: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if amx and not attention.has_amx():
        pytest.skip("no matrix unit")
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    xs, dy, segment_BT = attention_case(shape, packed)
    exact = with_gradients(naive_attention, [x.double() for x in xs], dy, segment_BT)
    got = with_gradients(blocked_attention, xs, dy, segment_BT)
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == torch.bfloat16
        close(one, other, BF16)


@needs_native
def test_attention_reads_strided_tensors() -> None:
    xs, dy, _ = attention_case((2, 70, 2, 2, 16), False)
    want = with_gradients(blocked_attention, xs, dy)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs]
    got = with_gradients(blocked_attention, turned, dy.transpose(1, 2).contiguous().transpose(1, 2))
    scattered = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in xs]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(blocked_attention(scattered[0], scattered[1], scattered[2]), want[0])


@needs_native
def test_far_scores_overflow_nothing() -> None:
    xs, dy, segment_BT = attention_case((2, 130, 2, 2, 16), True)
    xs = [(x * 30).bfloat16() for x in xs]
    for part in with_gradients(blocked_attention, xs, dy, segment_BT):
        assert torch.isfinite(part).all()


@needs_native
def test_a_nan_is_not_hidden() -> None:
    xs, _, _ = attention_case((1, 70, 1, 1, 16), False)
    xs[1][0, 3] = torch.nan
    y = blocked_attention(xs[0], xs[1], xs[2])
    assert torch.isnan(y[0, 66]).all()
    assert torch.isfinite(y[0, 2]).all()


@needs_native
@pytest.mark.parametrize("shape", [(1, 300, 2, 1, 16), (5, 100, 4, 4, 16)])
def test_attention_bits_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, int, int, int, int],
) -> None:
    xs, dy, segment_BT = attention_case(shape, True)
    same_for_all_threads(lambda: with_gradients(blocked_attention, xs, dy, segment_BT))


def same_for_all_threads(run: Callable[[], list[Tensor]]) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def angles_of(pos_BT: Tensor, head_dim: int, dtype: torch.dtype) -> Angles:
    turning = rotation(RopeConfig(theta=100.0), head_dim, dtype)
    assert turning is not None
    return rope_angles(pos_BT, turning)


def naive_norm_rope(x_BTNH: Tensor, weight_H: Tensor, pos_BT: Tensor | None, eps: float) -> Tensor:
    norm = F.rms_norm(x_BTNH, (x_BTNH.shape[-1],), weight_H, eps)
    if pos_BT is None:
        return norm
    angles = angles_of(pos_BT, x_BTNH.shape[-1], x_BTNH.dtype)
    return turn(norm.transpose(1, 2), angles).transpose(1, 2)


def native_norm_rope(x_BTNH: Tensor, weight_H: Tensor, pos_BT: Tensor | None, eps: float) -> Tensor:
    if pos_BT is None:
        return norm_rope(x_BTNH, weight_H, None, None, eps)
    return norm_rope(x_BTNH, weight_H, *angles_of(pos_BT, x_BTNH.shape[-1], torch.float32), eps)


def norm_rope_case(H: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(H)
    pos_BT = torch.stack([torch.arange(45) % 20, torch.arange(45)])
    return torch.randn(2, 45, 3, H), torch.rand(H) + 0.5, torch.randn(2, 45, 3, H), pos_BT


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("H", [1, 2, 7, 16, 24, 64, 130])
def test_norm_rope_equals_the_formula(H: int, positions: bool, dtype: torch.dtype) -> None:
    x, weight, dy, pos_BT = norm_rope_case(H)
    x, dy = x.to(dtype), dy.to(dtype)
    rest = (pos_BT if positions else None, 1e-5)
    exact = with_gradients(naive_norm_rope, [x.double(), weight.double()], dy.double(), *rest)
    got = with_gradients(native_norm_rope, [x, weight], dy, *rest)
    assert [part.dtype for part in got] == [dtype, dtype, torch.float32]
    for i, (one, other) in enumerate(zip(got, exact, strict=True)):
        # the gradient of a head of one channel is a difference of equals: 1 is its scale at least
        scale = max(float(other.abs().max()), float(H == 1))
        limit = 1e-5 if dtype == torch.float32 or i == 2 else 8e-3
        assert float((one.double() - other).abs().max()) < limit * scale


@needs_native
def test_norm_rope_reads_strided_tensors() -> None:
    x, weight, dy, pos_BT = norm_rope_case(24)
    want = with_gradients(native_norm_rope, [x, weight], dy, pos_BT, 1e-5)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    got = with_gradients(native_norm_rope, [turned, weight], dy.flip(1).flip(1), pos_BT, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_native
def test_norm_rope_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, dy, pos_BT = norm_rope_case(24)
    same_for_all_threads(lambda: with_gradients(native_norm_rope, [x, weight], dy, pos_BT, 1e-5))


@needs_native
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 1001)])
def test_the_gate_equals_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(1)
    gate, up, dy = (torch.randn(shape).mul(5).to(dtype) for _ in range(3))
    exact = with_gradients(silu_times_naive, [gate.double(), up.double()], dy.double())
    got = with_gradients(silu_times, [gate, up], dy)
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == dtype
        close(one, other, limit)


@needs_native
def test_the_gate_at_both_ends() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30])
    up = torch.ones_like(gate)
    for part in with_gradients(silu_times, [gate, up], up):
        assert torch.isfinite(part).all()
    close(silu_times(gate[1:6], up[1:6]), silu_times_naive(gate[1:6], up[1:6]), 1e-6)


@needs_native
def test_torch_knows_the_operators() -> None:
    xs, _, segment_BT = attention_case((2, 9, 4, 2, 8), True)
    assert segment_BT is not None
    leaves = tuple(x.requires_grad_() for x in xs)
    ops = torch.ops.valkyrie
    torch.library.opcheck(ops.attention.default, (*leaves, segment_BT.int()), rtol=0.1, atol=0.1)
    x, weight, _, pos_BT = norm_rope_case(8)
    angles = angles_of(pos_BT, 8, torch.float32)
    args = (x.requires_grad_(), weight.requires_grad_(), *angles, 1e-5)
    torch.library.opcheck(ops.norm_rope.default, args)
    torch.library.opcheck(
        ops.silu_times.default, tuple(torch.randn(3, 5).requires_grad_() for _ in range(2))
    )


@needs_native
def test_flops_of_attention_are_counted() -> None:
    xs, dy, _ = attention_case((2, 9, 4, 4, 8), False)
    with FlopCounterMode(display=False) as counter:
        with_gradients(blocked_attention, xs, dy)
    assert counter.get_total_flops() == 7 * 2 * 2 * 4 * (9 * 10 // 2) * 8


def awake(mixer: str) -> HybridLM:
    torch.manual_seed(2)
    model = HybridLM(model_config(mixer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def gradients(model: HybridLM, doc_BT: Tensor | None) -> dict[str, Tensor]:
    torch.manual_seed(7)
    x, y = torch.randint(0, 23, (2, 3, 37))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = model.loss(x, y, model.init_state(3), doc_BT)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_native
@pytest.mark.parametrize("mixer", ["attention", "attention-gqa", "attention-nope"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_trains_the_same_without_native_code(
    mixer: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = awake(mixer), awake(mixer)
    doc_BT = DOCS if packed else None
    calls: list[Tensor] = []

    def watched(*args: Tensor) -> Tensor:
        calls.append(args[0])
        return blocked_attention(*args)

    monkeypatch.setattr("valkyrie_core.nn.attention.blocked_attention", watched)
    got = gradients(fast, doc_BT)
    assert len(calls) == 2
    monkeypatch.setenv("VALKYRIE_NATIVE", "0")
    want = gradients(slow, doc_BT)
    assert len(calls) == 2
    assert got.keys() == want.keys()
    for name, grad in want.items():
        # two roads of bf16 apart
        difference = float((got[name] - grad).norm() / grad.norm())
        assert difference < 0.04, (name, difference)


@needs_native
def test_a_compiled_model_has_the_same_loss_and_gradients() -> None:
    eager = awake("attention")
    compiled = copy.deepcopy(eager)
    want = gradients(eager, None)
    loss = compiled.compiled_loss("default")
    torch.manual_seed(7)
    x, y = torch.randint(0, 23, (2, 3, 37))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _, _ = loss(x, y, compiled.init_state(3))
    torch.autograd.backward(value)
    for name, parameter in compiled.named_parameters():
        if name in want:
            assert parameter.grad is not None
            difference = float((parameter.grad - want[name]).norm() / want[name].norm())
            assert difference < 0.04, (name, difference)


def test_without_native_code_the_twins_serve_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VALKYRIE_NATIVE", "0")
    monkeypatch.setattr(announce, "_announced", set())
    model = HybridLM(hybrid_config("a"))
    with caplog.at_level(logging.WARNING, "valkyrie"):
        for _ in range(2):
            gradients(model, None)
    said = [r.getMessage() for r in caplog.records if "as PyTorch operations" in r.getMessage()]
    assert sorted(message.partition(" runs")[0].partition(" run ")[0] for message in said) == [
        "attention in bf16",
        "norms and rotary positions of attention",
        "the gate of SwiGLU",
        "the loss",
    ]


def test_other_types_take_the_twins() -> None:
    assert not attention.blocked_serves(torch.empty(1, 2, 1, 4))
    assert not attention.blocked_serves(torch.empty(1, 2, 1, 4, dtype=torch.float64))
    module = nn.Linear(4, 4).double()
    x = module(torch.randn(3, 4, dtype=torch.float64))
    torch.testing.assert_close(silu_times(x, x), silu_times_naive(x, x), rtol=0, atol=0)
