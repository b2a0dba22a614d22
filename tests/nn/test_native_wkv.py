"""The native WKV-7 kernel equals its slow twin, and its absence is announced."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.nn.test_wkv import documents, everything, inputs
from valkyrie_core import kernels
from valkyrie_core.kernels import build, native, wkv7, wkv7_chunked, wkv7_naive
from valkyrie_core.kernels.wkv_op import wkv7_native

needs_native = pytest.mark.skipif(
    "no C++ compiler" in str(native.why_not(8)), reason="no C++ compiler"
)
"""A source that a compiler refuses is a failure, not a reason to skip."""


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = float(
        (got.detach().double() - want.detach()).abs().max()
        / want.detach().abs().max().clamp(min=1e-12)
    )
    assert error < tolerance, error


@needs_native
@pytest.mark.parametrize("H", [4, 8, 16, 48, 64, 128])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 75])
@pytest.mark.parametrize("packed", [False, True])
def test_native_equals_naive_fp64(H: int, T: int, packed: bool) -> None:
    xs = inputs(2, T, 2, H, correlated=2.0)
    state = torch.randn(2, 2, H, H, dtype=torch.float64)
    doc = documents(2, T) if packed else None
    exact = everything(wkv7_naive, xs, state, doc)
    single = everything(wkv7, [x.float() for x in xs], state.float(), doc)
    for want, got in zip(exact, single, strict=True):
        assert got.dtype == torch.float32
        close(got, want, 1e-5)


@needs_native
def test_bf16_inputs_are_read_and_written_as_bf16() -> None:
    xs = [x.bfloat16() for x in inputs(1, 40, 2, 16)]
    state = torch.randn(1, 2, 16, 16)
    exact = everything(wkv7_naive, [x.double() for x in xs], state.double(), None)
    y, final, *grads = everything(wkv7, xs, state, None)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16] * 6 + [torch.float32]
    close(final, exact[1], 1e-5)
    for got, want in zip((y, *grads), (exact[0], *exact[2:]), strict=True):
        close(got, want, 8e-3)


@needs_native
def test_mixed_types_and_strided_inputs() -> None:
    xs = [x.float() for x in inputs(2, 20, 2, 8)]
    want, _ = wkv7(*xs)  # type: ignore[call-arg, misc]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in xs]
    got, _ = wkv7(*strided)  # type: ignore[call-arg, misc]
    assert torch.equal(got, want)
    xs[2] = xs[2].half()
    assert torch.isfinite(wkv7(*xs)[0]).all()  # type: ignore[call-arg, misc]


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    xs = [x.float() for x in inputs(3, 50, 3, 16)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(everything(wkv7, xs, torch.zeros(3, 3, 16, 16), None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
def test_the_operator_is_well_formed() -> None:
    xs = [x.float().requires_grad_() for x in inputs(1, 5, 2, 8)]
    state = torch.randn(1, 2, 8, 8, requires_grad=True)
    flags = torch.tensor([[0, 1, 2, 0, 0]], dtype=torch.uint8)
    torch.library.opcheck(wkv7_native, (*xs, state, flags, True))


@needs_native
def test_flops_are_counted() -> None:
    xs = [x.float().requires_grad_() for x in inputs(2, 7, 3, 8)]
    with FlopCounterMode(display=False) as forward:
        y, _ = wkv7(*xs)  # type: ignore[call-arg, misc]
    with FlopCounterMode(display=False) as back:
        y.sum().backward()
    assert forward.get_total_flops() == 9 * 2 * 7 * 3 * 64
    assert back.get_total_flops() == 27 * 2 * 7 * 3 * 64


def test_what_does_not_compile_does_not_load_the_compiler() -> None:
    """It takes a second, which every answer of `valkyrie generate` would wait for."""
    script = (
        "import sys, torch\n"
        "from valkyrie_core.kernels import wkv7\n"
        "import valkyrie_core.nn.model\n"
        "xs = [torch.zeros(1, 3, 1, 8, requires_grad=True) for _ in range(6)]\n"
        "torch.autograd.backward(wkv7(*xs)[0].sum())\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_mark_of_a_constant_is_still_torchs() -> None:
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).keys() <= vars(kernels.native_serves_width).keys()


@needs_native
def test_state_is_handed_between_native_and_the_twins() -> None:
    xs = inputs(1, 40, 2, 8)
    whole, _ = wkv7_naive(*xs)  # type: ignore[call-arg, misc]
    singles = [x.float() for x in xs]
    for first, second in ((wkv7, wkv7_chunked), (wkv7_chunked, wkv7), (wkv7_naive, wkv7)):
        y1, middle = first(*(x[:, :13] for x in singles))  # type: ignore[arg-type]
        y2, _ = second(*(x[:, 13:] for x in singles), middle)  # type: ignore[arg-type]
        close(torch.cat([y1, y2], dim=1), whole, 1e-5)


def test_without_a_compiler_the_chunked_form_serves_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VALKYRIE_NATIVE", "0")
    monkeypatch.setattr(kernels, "_announced", set())
    xs = [x.float() for x in inputs(1, 9, 1, 8)]
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        y, _ = wkv7(*xs)  # type: ignore[call-arg, misc]
        wkv7(*xs)  # type: ignore[call-arg, misc]
    close(y, wkv7_naive(*(x.double() for x in xs))[0], 1e-5)  # type: ignore[arg-type]
    assert sum("slower" in record.message for record in caplog.records) == 1
    assert kernels.available(8)[0] == "chunked"


def test_a_missing_compiler_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="there is no no-such-compiler"):
        build._compiler()


def _build(cache: str, queue: multiprocessing.Queue[str]) -> None:
    import os

    os.environ["VALKYRIE_CACHE"] = cache
    queue.put(str(native.library(4)._name))


@needs_native
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_build, args=(str(tmp_path), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    names = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(names) == 1
    library = Path(names.pop())
    kept = sorted(p.name for p in (tmp_path / "kernels").iterdir())
    assert kept == sorted([library.name, library.with_suffix(".sha256").name])
