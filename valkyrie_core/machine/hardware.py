"""What this machine is and what it can do: processor, versions, measured peaks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch

import valkyrie_core
from valkyrie_core.machine.measured import measured

log = logging.getLogger("valkyrie")

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL_SIZES = (1024, 2048, 4096)
EXTRAS: dict[str, dict[str, str]] = {
    "gpu": {"fla": "Triton kernels for RWKV-7 on a GPU"},
    "bench": {
        "transformers": "comparing with Hugging Face models",
        "rwkv": "comparing with the author's RWKV runtime",
    },
    "track": {
        "tensorboard": "train.track: {type: tensorboard}",
        "trackio": "train.track: {type: trackio}",
        "wandb": "train.track: {type: wandb}",
    },
}
"""Per extra of this package: the modules that it brings, and what each is for."""


class Cpu(NamedTuple):
    """The processor: its name and the instruction sets that matter to matrix products."""

    model: str
    flags: tuple[str, ...]


class MatmulPeak(NamedTuple):
    """The best measured rate of a square matrix product, in floating-point operations/second."""

    flops_per_second: float
    size: int
    precision: Precision
    device: str


_FLAGS = {
    "avx2": r"avx2",
    "avx512f": r"avx512f",
    "avx512_bf16": r"avx512_bf16",
    "avx512_vnni": r"avx512_vnni|avx_vnni",
    "amx": r"amx_tile",
    "amx_bf16": r"amx_bf16",
    "neon": r"asimd|neon",
    "bf16": r"bf16",
}


def parse_cpuinfo(text: str) -> Cpu:
    """The processor that a Linux /proc/cpuinfo describes (x86 and ARM spellings)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    words = (fields.get("flags") or fields.get("features") or "").split()
    flags = tuple(
        name
        for name, pattern in _FLAGS.items()
        if any(re.fullmatch(pattern, word) for word in words)
    )
    model = fields.get("model name") or fields.get("cpu model") or platform.machine()
    return Cpu(model, flags)


@cache
def cpu() -> Cpu:
    """This machine's processor; where its flags can't be read, none are claimed."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return parse_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    if sys.platform == "darwin":
        try:
            answer = subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"],
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            log.debug("sysctl did not name the processor: %s", error)
        else:
            return Cpu(answer.stdout.strip(), ())
    return Cpu(platform.processor() or platform.machine(), ())


def supports_bf16(device: str = "cpu") -> bool:
    """Whether the device multiplies bf16 matrices in hardware (emulation is slower than fp32)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps":
        return False
    return any(flag in cpu().flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def devices() -> list[dict[str, Any]]:
    """Every device torch can compute on: its torch name, model, and memory in bytes if known."""
    found: list[dict[str, Any]] = [{"device": "cpu", "model": cpu().model}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "model": properties.name,
                "memory_bytes": properties.total_memory,
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "model": platform.machine()})
    return found


def extras() -> dict[str, dict[str, str | None]]:
    """Per extra, the version of every module it brings; None where it is not installed."""
    return {
        extra: {module: _version(module) for module in modules} for extra, modules in EXTRAS.items()
    }


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    distribution = {"fla": "flash-linear-attention"}.get(module, module)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def environment() -> dict[str, Any]:
    """What a run records about where it ran, as plain JSON values."""
    processor = cpu()
    return {
        "valkyrie": valkyrie_core.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__),
        "platform": platform.platform(),
        "cpu": {"model": processor.model, "flags": list(processor.flags)},
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices(),
        "extras": extras(),
    }


def matmul_peak(
    precision: Precision,
    *,
    cache_dir: Path | None = None,
    device: str = "cpu",
    refresh: bool = False,
) -> MatmulPeak:
    """This machine's best measured matmul rate; the denominator of model FLOPs utilisation.

    Measured once (under 3 seconds on a CPU), then read from `cache_dir/machine.json`, keyed by
    processor, threads, torch version, device and precision. A cache that can't be read or
    written costs a measurement, never an error.
    """

    def measure() -> dict[str, float]:
        peak = measure_matmul(precision, device=device)
        return {"flops_per_second": peak.flops_per_second, "size": peak.size}

    key = "|".join((processor_key(device), device, precision))
    names = ("flops_per_second", "size")
    found = measured(key, names, measure, cache_dir=cache_dir, refresh=refresh)
    return MatmulPeak(found["flops_per_second"], int(found["size"]), precision, device)


def measure_matmul(
    precision: Precision, *, device: str = "cpu", budget_seconds: float = 2.5
) -> MatmulPeak:
    """Times square products of 1024, 2048 and 4096 and keeps the best rate.

    The first size always runs; a size whose predicted time would overrun the budget is left out.
    """
    best = MatmulPeak(0.0, 0, precision, device)
    began = time.perf_counter()
    for size in MATMUL_SIZES:
        flops = 2 * size**3
        left = budget_seconds - (time.perf_counter() - began)
        # a warm-up and two repeats
        if best.size and 3 * flops / best.flops_per_second > left:
            break
        operand = torch.randn(size, size, device=device).to(DTYPES[precision])
        _time_matmul(operand)
        repeats = 0
        stretch = time.perf_counter()
        while repeats < 2 or (repeats < 8 and time.perf_counter() - stretch < budget_seconds / 6):
            rate = flops / _time_matmul(operand)
            if rate > best.flops_per_second:
                best = MatmulPeak(rate, size, precision, device)
            repeats += 1
    return best


def _time_matmul(operand: torch.Tensor) -> float:
    """Seconds for one product, waiting for the device."""
    synchronize(operand.device)
    began = time.perf_counter()
    with torch.inference_mode():
        operand @ operand
    synchronize(operand.device)
    return max(time.perf_counter() - began, 1e-9)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def processor_key(device: str = "cpu") -> str:
    """What a measured rate depends on: processor, threads, torch version."""
    model = cpu().model
    if torch.device(device).type == "cuda":
        model = torch.cuda.get_device_name(torch.device(device))
    return "|".join((model, f"{torch.get_num_threads()} threads", str(torch.__version__)))
