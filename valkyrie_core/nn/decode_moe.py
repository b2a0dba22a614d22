"""The native step of a mixture of experts, which reads the experts that a token meets and no other.

Shapes: B batch (at most 8), D model, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.kernels import decode as kernel
from valkyrie_core.kernels.arena import Arena
from valkyrie_core.nn.decode_native import Native
from valkyrie_core.nn.moe.experts import MlpExperts
from valkyrie_core.nn.moe.gates import NoisyTopK, SigmoidTopK, SoftmaxTopK, Switch, TopP
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.state import Ctx
from valkyrie_core.nn.weights import Weights


class _Gate(NamedTuple):
    """What native code knows of a gate."""

    kind: int
    slots: int
    normalized: bool
    scale: float = 1.0
    mass: float = 0.0


def _gate_of(gate: nn.Module) -> _Gate | None:
    """None for a gate that native code does not know; exact types, as a subclass may differ."""
    if type(gate) in (SoftmaxTopK, NoisyTopK):
        assert isinstance(gate, SoftmaxTopK)
        return _Gate(0, gate.top_k, gate.top_k > 1)
    if type(gate) is Switch:
        return _Gate(0, 1, False)
    if type(gate) is SigmoidTopK:
        return _Gate(1, gate.top_k, gate.top_k > 1, gate.scale)
    if type(gate) is TopP:
        return _Gate(2, gate.max_experts, True, mass=gate.mass)
    return None


def has_step(mixer: MoE) -> bool:
    """Whether there is a native step for this mixture: SwiGLUs, one round, no exchange."""
    return (
        type(mixer.experts) is MlpExperts
        and mixer.exchange is None
        and len(mixer.routers) == 1
        and _gate_of(mixer.each_router[0].gate) is not None
    )


class MoEStep(Native):
    """A router, the experts that it chooses, and the shared one."""

    def __init__(self, norm: nn.Module, mixer: MoE, weights: Weights, arena: Arena) -> None:
        super().__init__(weights, arena, kernel.moe_library(), "moe")
        experts, router = mixer.experts, mixer.each_router[0]
        gate = _gate_of(router.gate)
        assert isinstance(experts, MlpExperts)
        assert gate is not None
        E, hidden, D = experts.up_EHD.shape
        pack, groups, sure_1D = self._pack, router.groups, router.confidence_1D
        shared = {}
        if mixer.shared is not None:
            shared = {
                "shared_gate": pack.matrix(mixer.shared.gate.weight),
                "shared_up": pack.matrix(mixer.shared.up.weight),
                "shared_down": pack.matrix(mixer.shared.down.weight),
            }
        self._keep(
            kernel.MoE(
                *(D, hidden, E, gate.slots, gate.kind, gate.normalized, gate.scale, gate.mass),
                groups=0 if groups is None else groups.num_groups,
                top_groups=0 if groups is None else groups.top_groups,
                shared_hidden=0 if mixer.shared is None else mixer.shared.hidden_dim,
                norm=pack.norm(norm),
                # every expert's row is padded by itself
                router=pack.vector(F.pad(router.weight_ED, (0, -D % kernel.GROUP))),
                confidence=None if sure_1D is None else pack.vector(sure_1D),
                bias=pack.vector(router.bias_E),
                gates=pack.matrices(experts.gate_EHD),
                ups=pack.matrices(experts.up_EHD),
                downs=pack.matrices(experts.down_EDH),
                **shared,
            )
        )

    def __call__(
        self, x_BD: Tensor, state: tuple[()], ctx: Ctx, queue: kernel.Queue
    ) -> tuple[Tensor, tuple[()], Ctx]:
        """See `Step`."""
        y_BD = torch.empty_like(x_BD)
        pointers = (x_BD.data_ptr(), y_BD.data_ptr())
        queue.add(self._step, self._at, pointers, self._size(queue), x_BD, y_BD)
        return y_BD, state, ctx
