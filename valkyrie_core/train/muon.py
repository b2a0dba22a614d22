"""torch's Muon, its iteration in fp32 where the processor only emulates bf16.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. torch.optim.Muon always iterates in
bf16, which on a processor without bf16 instructions takes three quarters of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from valkyrie_core.machine.hardware import supports_bf16


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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer, momentum = state["momentum_buffer"], group["momentum"]
                buffer.lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = orthogonalised(
                    update, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))
        return None


def orthogonalised(
    matrix_RC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The matrix with all singular values near 1, by Newton-Schulz steps in its own type."""
    a, b, c = coefficients
    tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.T if tall else matrix_RC
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
