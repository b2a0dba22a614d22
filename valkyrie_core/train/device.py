"""Where a model computes and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from valkyrie_core.errors import MissingError
from valkyrie_core.machine.hardware import Precision, supports_bf16

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The type of `train.weights`."""


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


def resolve_precision(
    precision: Literal["auto", "bf16", "fp32"], device: torch.device
) -> Precision:
    """`auto` is bf16 where the device computes in it (not where it only emulates it)."""
    if precision == "auto":
        return "bf16" if supports_bf16(device.type) else "fp32"
    return precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The context in which the model runs forward: bf16 matrix products, weights in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
