"""The hand-off to flash-linear-attention equals the per-token twin.

On a CPU a stand-in, written from the formula with flash-linear-attention's conventions, takes the
place of its kernels; the kernels themselves are compared where there is a CUDA device.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.nn.test_wkv import documents, everything, inputs
from valkyrie_core import kernels
from valkyrie_core.kernels import gpu, wkv7, wkv7_naive


def recurrence(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Its conventions: [key, value] states, one per document; documents end to end in one row."""
    assert output_final_state
    B, T, N, H = r.shape
    if cu_seqlens is None:
        spans = [(row, 0, T) for row in range(B)]
    else:
        assert B == 1, "documents must be flattened"
        assert cu_seqlens.dtype in (torch.int32, torch.int64)
        bounds = cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in itertools.pairwise(bounds)]
        assert bounds[0] == 0
        assert bounds[-1] == T
        assert all(start < end for _, start, end in spans)
    if initial_state is None:
        initial_state = torch.zeros(len(spans), N, H, H, dtype=torch.float32)
    assert len(initial_state) == len(spans)
    assert initial_state.is_contiguous()
    y, finals = torch.zeros_like(v), []
    for (row, start, end), S in zip(spans, initial_state, strict=True):
        for t in range(start, end):
            aS = torch.einsum("nk,nkv->nv", a[row, t].to(S.dtype), S)
            S = w[row, t].exp()[:, :, None] * S
            S = S + b[row, t][:, :, None] * aS[:, None] + k[row, t][:, :, None] * v[row, t][:, None]
            out = scale * torch.einsum("nk,nkv->nv", r[row, t].to(S.dtype), S)
            y = y.index_put((torch.tensor(row), torch.tensor(t)), out.to(y.dtype))
        finals.append(S)
    return y, torch.stack(finals)


class StandIn(ModuleType):
    """What `fla.ops.rwkv7` offers; notes what is called, with which types of r and log_decay."""

    calls: list[tuple[str, torch.dtype, torch.dtype]]

    def __init__(self) -> None:
        super().__init__("fla.ops.rwkv7")
        self.calls = []

    def chunk_rwkv7(self, **arguments: object) -> tuple[Tensor, Tensor]:
        r, k, v, a, b = (arguments[name] for name in "rkvab")
        assert r.dtype == k.dtype == v.dtype == a.dtype == b.dtype != torch.float32  # type: ignore[attr-defined]
        self._note("chunk", arguments)
        return recurrence(**arguments)  # type: ignore[arg-type]

    def fused_recurrent_rwkv7(self, **arguments: object) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled(), "it has no backward pass"
        self._note("recurrent", arguments)
        return recurrence(**arguments)  # type: ignore[arg-type]

    def _note(self, name: str, arguments: dict[str, object]) -> None:
        r, w = arguments["r"], arguments["w"]
        assert isinstance(r, Tensor)
        assert isinstance(w, Tensor)
        self.calls.append((name, r.dtype, w.dtype))


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found and announced in one test is not remembered in the next."""
    gpu.why_not.cache_clear()
    monkeypatch.setattr(gpu, "_announced", set())
    yield
    gpu.why_not.cache_clear()


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", stand_in)
    return stand_in


def state(B: int, N: int, H: int) -> Tensor:
    return torch.randn(B, N, H, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def awkward(T: int) -> Tensor:
    """Rows: padding first and between, one document, an id that returns, only padding."""
    doc = torch.zeros(4, T, dtype=torch.long)
    doc[0, : T // 4], doc[0, T // 2 :], doc[0, T // 2] = -1, 7, -1
    doc[2, T // 3 : 2 * T // 3] = 1
    doc[3] = -1
    return doc


@pytest.mark.parametrize("T", [1, 2, 13, 33])
@pytest.mark.parametrize("packing", ["none", "awkward", "random"])
def test_the_hand_off_equals_naive_with_gradients(fla: StandIn, T: int, packing: str) -> None:
    xs = inputs(4, T, 2, 5)
    doc = {"none": None, "awkward": awkward(T), "random": documents(4, T)}[packing]
    want = everything(wkv7_naive, xs, state(4, 2, 5), doc)
    got = everything(gpu.wkv7_fla, xs, state(4, 2, 5), doc)
    assert [name for name, *_ in fla.calls] == ["chunk"]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_left_out_is_zeros(fla: StandIn, packed: bool) -> None:
    xs = [x.bfloat16() for x in inputs(4, 9, 2, 5)]
    doc = awkward(9) if packed else None
    y, final = gpu.wkv7_fla(*xs, doc_BT=doc)  # type: ignore[misc, arg-type]
    same_y, same_final = gpu.wkv7_fla(*xs, torch.zeros(4, 2, 5, 5), doc)  # type: ignore[arg-type]
    assert torch.equal(y, same_y)
    assert torch.equal(final, same_final)
    assert final.dtype == torch.float32


def test_the_state_of_a_split_text_carries_on(fla: StandIn) -> None:
    xs, doc = inputs(4, 21, 2, 5), awkward(21)
    want_y, want_final = wkv7_naive(*xs, state(4, 2, 5), doc)  # type: ignore[arg-type]
    for first, second in ((gpu.wkv7_fla, wkv7_naive), (wkv7_naive, gpu.wkv7_fla)):
        for cut in (3, 8, 16):  # inside documents: where one starts, the caller clears the state
            y1, middle = first(*(x[:, :cut] for x in xs), state(4, 2, 5), doc[:, :cut])  # type: ignore[arg-type]
            y2, final = second(*(x[:, cut:] for x in xs), middle, doc[:, cut:])  # type: ignore[arg-type]
            torch.testing.assert_close(torch.cat([y1, y2], dim=1), want_y)
            torch.testing.assert_close(final, want_final)


def test_the_state_is_value_by_key(fla: StandIn) -> None:
    one = torch.zeros(6, 1, 1, 1, 4, dtype=torch.float64)
    r, log_decay, k, v, a, b = one
    k[..., 1], v[..., 2], r[..., 1] = 1.0, 5.0, 1.0
    y, final = gpu.wkv7_fla(r, log_decay, k, v, a, b)
    assert y.flatten().tolist() == [0, 0, 5, 0]
    assert float(final[0, 0, 2, 1]) == 5


@pytest.mark.parametrize(
    ("dtype", "T", "grad", "kernel", "inside"),
    [
        (torch.bfloat16, 1, False, "recurrent", torch.bfloat16),
        (torch.float32, 1, False, "recurrent", torch.float32),
        (torch.float32, 70, False, "recurrent", torch.float32),
        (torch.bfloat16, 70, False, "chunk", torch.bfloat16),
        (torch.float16, 1, True, "chunk", torch.float16),
        (torch.float32, 1, True, "chunk", torch.bfloat16),
    ],
)
def test_the_kernel_and_its_types(
    fla: StandIn,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    T: int,
    grad: bool,
    kernel: str,
    inside: torch.dtype,
) -> None:
    xs = [x.to(dtype) for x in inputs(1, T, 1, 4)]
    xs[1] = xs[1].float()
    with caplog.at_level(logging.WARNING, logger="valkyrie"), torch.set_grad_enabled(grad):
        for _ in range(2):
            y, final = gpu.wkv7_fla(*xs, torch.zeros(1, 1, 4, 4))  # type: ignore[arg-type]
    assert fla.calls == 2 * [(kernel, inside, torch.float32)]
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert sum("bf16" in record.message for record in caplog.records) == (inside != dtype)


def test_inputs_of_mixed_types_follow_r(fla: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    """Under autocast matrices give bf16, and what stands beside them fp32."""
    xs = [x.float().requires_grad_() for x in inputs(1, 5, 1, 4)]
    y, _ = gpu.wkv7_fla(xs[0].bfloat16(), *xs[1:])  # type: ignore[arg-type]
    assert fla.calls == [("chunk", torch.bfloat16, torch.float32)]
    assert y.dtype == torch.bfloat16
    assert not caplog.records
    grads = torch.autograd.grad(y.sum(), xs)
    assert all(g.dtype == torch.float32 and bool(g.any()) for g in grads[:4])


def test_wkv7_hands_over_what_is_served(fla: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_native_serves", lambda r: False)
    monkeypatch.setattr(gpu, "serves", lambda r: True)
    xs, doc = inputs(4, 13, 2, 5), awkward(13)
    want = everything(wkv7_naive, xs, state(4, 2, 5), doc)
    got = everything(wkv7, xs, state(4, 2, 5), doc)
    assert len(fla.calls) == 1
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_it_serves_a_gpu_alone(fla: StandIn) -> None:
    assert not gpu.serves(torch.zeros(1, 1, 1, 64))
    assert gpu._serves_width(64)
    assert not fla.calls


@pytest.mark.parametrize("head_dim", [8, 512])
def test_a_head_without_a_kernel_is_a_reason(fla: StandIn, head_dim: int) -> None:
    assert str(head_dim) in str(gpu.why_not(head_dim))
    assert gpu.why_not(64) is None


def test_its_absence_is_announced_once_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        assert not gpu._serves_width(64)
        assert not gpu._serves_width(64)
    (record,) = caplog.records
    assert "slower" in record.message
    assert "valkyrie-lab[gpu]" in record.message


def test_a_compiled_caller_gets_the_same(fla: StandIn) -> None:
    xs, doc = inputs(4, 13, 2, 5), awkward(13)

    def call(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        *leaves, start, doc_BT = arguments
        with torch.autocast("cpu", enabled=False):
            y, final = gpu.wkv7_fla(*leaves, start, doc_BT)  # type: ignore[arg-type]
        return 2 * y, final

    want = everything(call, xs, state(4, 2, 5), doc)
    got = everything(torch.compile(call, backend="eager"), xs, state(4, 2, 5), doc)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.fixture
def real_fla() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("fla.ops.rwkv7", reason="needs the extra gpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("real_fla")
@pytest.mark.parametrize("H", [16, 48, 64, 128])
@pytest.mark.parametrize("T", [1, 33, 75])
@pytest.mark.parametrize("packed", [False, True])
def test_its_chunk_kernels_equal_naive(H: int, T: int, packed: bool) -> None:
    """bf16 inputs against fp64 on the same values; correlated keys, gradients included."""
    xs = [x.bfloat16() for x in inputs(4, T, 2, H, correlated=2.0)]
    doc = awkward(T) if packed else None
    want = everything(wkv7_naive, [x.double() for x in xs], state(4, 2, H), doc)
    got = everything(
        lambda *args: tuple(x.cpu() for x in wkv7(*(x if x is None else x.cuda() for x in args))),
        xs,
        state(4, 2, H).float(),
        doc,
    )
    for g, w in zip(got, want, strict=True):
        assert float((g.double() - w).abs().max() / w.abs().max().clamp(min=1e-12)) < 2e-2


@pytest.mark.gpu
@pytest.mark.usefixtures("real_fla")
@pytest.mark.parametrize("T", [1, 75])
@pytest.mark.parametrize("packed", [False, True])
def test_its_kernel_per_token_equals_naive_in_fp32(T: int, packed: bool) -> None:
    xs, doc = inputs(4, T, 2, 64, correlated=2.0), awkward(T) if packed else None
    want = wkv7_naive(*xs, state(4, 2, 64), doc)  # type: ignore[arg-type]
    with torch.no_grad():
        got = wkv7(
            *(x.float().cuda() for x in xs),  # type: ignore[arg-type]
            state(4, 2, 64).float().cuda(),
            None if doc is None else doc.cuda(),
        )
    for g, w in zip(got, want, strict=True):
        assert float((g.cpu().double() - w).abs().max() / w.abs().max().clamp(min=1e-12)) < 1e-5
