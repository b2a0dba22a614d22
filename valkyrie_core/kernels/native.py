"""The native WKV-7 kernel for the CPU: built once on the machine it runs on, called through ctypes.

The source is plain C++ without torch's headers, so a build takes about a second. A library is
named by a hash of its source, its flags, the compiler and the processor, and renamed into place
whole: two processes that build at once write the same file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from valkyrie_core.cache import cache_dir

log = logging.getLogger("valkyrie")

SOURCE = Path(__file__).with_name("wkv7.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# the first set that compiles is taken: the processor's own vectors, both cores
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
BUILD_SECONDS = 120
DTYPES = (torch.float32, torch.bfloat16)


class BuildError(Exception):
    """There is no compiler, or it refuses the source; the message is its last word."""


@functools.cache
def library(head_dim: int) -> ctypes.CDLL:
    """The kernel for one head width, built on first use.

    Raises:
        BuildError: it can't be built or loaded here.
    """
    compiler = _compiler()
    source = SOURCE.read_bytes()
    errors = []
    for extra in OPTIONAL_FLAGS:
        flags = (*FLAGS, *extra, f"-DHEAD_DIM={head_dim}")
        key = hashlib.sha256(b"\0".join([source, *(x.encode() for x in flags), _machine(compiler)]))
        path = cache_dir() / "kernels" / f"wkv7-{head_dim}-{key.hexdigest()[:20]}.so"
        try:
            if not path.exists():
                _build(compiler, flags, path)
            loaded = _declare(ctypes.CDLL(str(path)))
        except (BuildError, OSError) as error:
            errors.append(str(error))
            continue
        if "-fopenmp" not in extra:
            log.warning("the native WKV-7 kernel runs on one core: %s has no OpenMP", compiler)
        return loaded
    raise BuildError(errors[0])


def why_not(head_dim: int) -> str | None:
    """None where the kernel for this head width works here, else the reason."""
    if os.environ.get("VALKYRIE_NATIVE") == "0":
        return "VALKYRIE_NATIVE=0"
    if head_dim % 4:
        return f"a head of {head_dim} is no multiple of 4"
    return _failure(head_dim)


@functools.cache
def _failure(head_dim: int) -> str | None:
    # cached besides `library`: a build that failed is not tried again at every call
    try:
        library(head_dim)
    except BuildError as error:
        return str(error)
    return None


def forward(
    inputs: list[Tensor], flags_BT: Tensor | None, state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, and with `save` what the backward pass needs (else empty tensors).

    `inputs` are r, log_decay, k, v, a, b: [B, T, N, H], contiguous, each fp32 or bf16.
    """
    B, T, N, H = inputs[0].shape
    lib = library(H)
    y = torch.empty_like(inputs[0])
    final = torch.empty(B, N, H, H)
    stretches = -(-T // lib.wkv7_checkpoint())
    sa = torch.empty(B, T, N, H) if save else torch.empty(0)
    checkpoints = torch.empty(B, N, stretches, H, H) if save else torch.empty(0)
    lib.wkv7_forward(
        _pointers(inputs),
        _kinds(inputs),
        _pointer(flags_BT),
        _pointer(state),
        y.data_ptr(),
        int(y.dtype == torch.bfloat16),
        final.data_ptr(),
        sa.data_ptr() if save else None,
        checkpoints.data_ptr() if save else None,
        *(B, T, N, torch.get_num_threads()),
    )
    return y, final, sa, checkpoints


def backward(
    inputs: list[Tensor],
    flags_BT: Tensor | None,
    sa: Tensor,
    checkpoints: Tensor,
    dy: Tensor,
    d_final: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the six inputs, each in its own type, and of the initial state."""
    B, T, N, H = inputs[0].shape
    grads = [torch.empty_like(x) for x in inputs]
    d_state = torch.empty(B, N, H, H)
    failed = library(H).wkv7_backward(
        _pointers(inputs),
        _kinds(inputs),
        _pointer(flags_BT),
        sa.data_ptr(),
        checkpoints.data_ptr(),
        dy.data_ptr(),
        int(dy.dtype == torch.bfloat16),
        d_final.data_ptr(),
        _pointers(grads),
        d_state.data_ptr(),
        *(B, T, N, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the states of one stretch of WKV-7")
    return grads, d_state


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _kinds(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(tensors))(*(int(x.dtype == torch.bfloat16) for x in tensors))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.wkv7_checkpoint.restype = integer
    lib.wkv7_forward.restype = None
    lib.wkv7_forward.argtypes = [
        *(pointer, pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer),
        *(size, size, size, integer),
    ]
    lib.wkv7_backward.restype = integer
    lib.wkv7_backward.argtypes = [
        *(pointer, pointer, pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer),
        *(size, size, size, integer),
    ]
    return lib


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler (c++, g++ or clang++)")


@functools.cache
def _machine(compiler: str) -> bytes:
    """What -march=native depends on: the compiler and the processor."""
    run = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = b""
    if cpuinfo.exists():
        lines = cpuinfo.read_bytes().splitlines()
        wanted = (b"flags", b"model name", b"Features")
        flags = b"\n".join(sorted({x for x in lines if x.startswith(wanted)}))
    return run.stdout + platform.machine().encode() + flags


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        out = Path(folder) / path.name
        command = [compiler, *flags, str(SOURCE), "-o", str(out)]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(str(error)) from None
        if run.returncode:
            lines = [x for x in run.stderr.splitlines() if "error" in x] or ["it failed"]
            raise BuildError(f"{compiler}: {lines[0]}")
        out.replace(path)
    log.info("built the native WKV-7 kernel for heads of %s", path.name.split("-")[1])
