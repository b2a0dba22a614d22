"""Where a model computes and in which precision."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

from valkyrie_core.errors import MissingError

_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def resolve_device(name: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """The device a recipe asks for; auto is cuda, else mps, else cpu.

    Raises MissingError where the named device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if not available[name]:
        raise MissingError(
            f"the recipe asks for device {name}, which this machine or this torch lacks",
            hint="use --set device=auto",
        )
    return torch.device(name)


def cpu_computes_bf16() -> bool:
    """Whether the processor has bf16 arithmetic (AVX512-BF16, AMX or Arm's BF16)."""
    # new in torch 2.13; older releases know it only under private names
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None and any(capabilities().get(flag) for flag in _BF16_FLAGS):
        return True
    if sys.platform != "linux":
        return False  # macOS and Windows name no cheap way to tell; fp32 is never slow there
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


def resolve_precision(
    precision: Literal["auto", "bf16", "fp32"], device: torch.device
) -> Literal["bf16", "fp32"]:
    """`auto` is bf16 where the device computes in it (not where it only emulates it)."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "bf16" if cpu_computes_bf16() else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32"


def autocast(
    precision: Literal["bf16", "fp32"], device: torch.device
) -> AbstractContextManager[None]:
    """The context in which the model runs forward: bf16 matrix products, weights in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
