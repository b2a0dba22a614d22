"""torch's Muon, its iteration in fp32 where the processor only emulates bf16; and for stacks.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. torch.optim.Muon always iterates in
bf16, which on a processor without bf16 instructions takes three quarters of a training step, and
takes two-dimensional matrices only.

Shapes: S matrices of a stack, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from valkyrie_core.machine.hardware import supports_bf16

NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Those of torch.optim.Muon."""


class Muon(torch.optim.Muon):
    """torch.optim.Muon with the scaling lr * sqrt(max(1, rows / columns)); the same state."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix."""
        if all(
            supports_bf16(p.device.type) for group in self.param_groups for p in group["params"]
        ):
            loss: float | None = super().step(closure)  # type: ignore[no-untyped-call]
            return loss
        if closure is not None:
            raise ValueError("a closure is not supported where bf16 is only emulated")
        _update_all(self)
        return None


class StackedMuon(torch.optim.Optimizer):
    """Muon for stacks of matrices [S, R, C], each updated as if it were alone."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_steps: int = 5,
        eps: float = 1e-7,
    ) -> None:
        settings = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": True,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
        }
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every stack that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        _update_all(self)
        return None


def _update_all(optimizer: torch.optim.Optimizer) -> None:
    """One update of everything that has a gradient, in bf16 where the hardware computes in it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            hardware = supports_bf16(parameter.device.type)
            dtype = torch.bfloat16 if hardware else torch.float32
            _update(parameter, parameter.grad, state["momentum_buffer"], group, dtype)


def _update(
    weight: Tensor, gradient: Tensor, buffer: Tensor, group: dict[str, Any], dtype: torch.dtype
) -> None:
    """One update in place of a matrix or a stack of them, iterated in `dtype`."""
    momentum = group["momentum"]
    buffer.lerp_(gradient, 1 - momentum)
    update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
    settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
    update = orthogonalised(update.to(dtype), *settings).to(weight.dtype)
    rows, columns = weight.shape[-2:]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalised(
    matrix_RC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The matrix, or every matrix of a stack, with all singular values near 1: Newton-Schulz steps
    in its own type."""
    a, b, c = coefficients
    tall = matrix_RC.shape[-2] > matrix_RC.shape[-1]
    x = matrix_RC.mT if tall else matrix_RC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
