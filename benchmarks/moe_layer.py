"""A mixture of experts against a dense layer that computes as much, as in training.

Eight experts at a width of 512, two for a token, against SwiGLU as wide as both together: equal
products for a token, four times the weights. Forward and backward with all gradients, under bf16
autocast where the processor computes in it (emulated, it takes minutes) and else in fp32. Tokens
are random, so that loads are uneven by chance alone; and skewed, where one expert meets nearly
every token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from benchmarks.block import forward_backward
from benchmarks.result import Findings, Gate
from benchmarks.timing import Announce, Call, side_by_side
from valkyrie_core.machine.hardware import supports_bf16
from valkyrie_core.nn.ffn import SwiGLUConfig
from valkyrie_core.nn.moe.layer import MoE, MoEConfig
from valkyrie_core.nn.state import Ctx
from valkyrie_core.train.allocator import keep_memory

DENSE, EVEN, SKEWED = "dense", "experts", "experts, skewed"
GATE = Gate(0.9)


class Sizes(NamedTuple):
    """What is measured."""

    dim: int
    hidden_dim: int
    """Of an expert."""
    tokens: int
    repeats: int


FULL = Sizes(512, 1024, 8192, 15)
QUICK = Sizes(64, 64, 256, 3)
EXPERTS, SLOTS = 8, 2


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Milliseconds of forward and backward."""
    # as a training does: else every output's pages are mapped anew
    keep_memory()
    findings = Findings()
    case = f"{sizes.tokens} tokens"
    calls = {
        EVEN: call(sizes, experts(sizes)),
        SKEWED: call(sizes, experts(sizes, skewed=True)),
        DENSE: call(sizes, dense(sizes)),
    }
    timings = side_by_side(
        calls, repeats=sizes.repeats, announce=lambda text: announce(f"{case}, {text}")
    )
    findings.milliseconds(case, timings)
    for name in (EVEN, SKEWED):
        gate = GATE if name == EVEN else None
        findings.compare("equal FLOPs", case, (name, timings[name]), (DENSE, timings[DENSE]), gate)
    weights = {
        name: sum(parameter.numel() for parameter in make(sizes).parameters())
        for name, make in ((EVEN, experts), (DENSE, dense))
    }
    findings.notes.append(
        f"{'bf16 autocast' if supports_bf16() else 'fp32'}; {EXPERTS} experts, {SLOTS} for a "
        f"token; parameters: experts {weights[EVEN]:,}, dense {weights[DENSE]:,}."
    )
    return findings


def experts(sizes: Sizes, *, skewed: bool = False) -> nn.Module:
    """The mixture; skewed: a bias sends nearly every token to the first expert."""
    torch.manual_seed(0)
    config = MoEConfig.model_validate(
        {"num_experts": EXPERTS, "expert": {"type": "mlp", "hidden_dim": sizes.hidden_dim}}
    )
    layer = config.build(sizes.dim, layer_idx=0, num_layers=1)
    assert isinstance(layer, MoE)
    if skewed:
        layer.each_router[0].bias_E[0] = 1.0
    return _awake(layer)


def dense(sizes: Sizes) -> nn.Module:
    """SwiGLU as wide as a token's experts together."""
    torch.manual_seed(0)
    config = SwiGLUConfig(hidden_dim=SLOTS * sizes.hidden_dim)
    return _awake(config.build(sizes.dim, layer_idx=0, num_layers=1))


def call(sizes: Sizes, layer: nn.Module) -> Call:
    """Forward and backward over rows of 1024 tokens, or one that is shorter."""
    T = min(1024, sizes.tokens)
    shape = (sizes.tokens // T, T, sizes.dim)
    x_BTD = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    pos_BT = torch.arange(T).expand(shape[:2])
    ctx = Ctx(pos_BT=pos_BT, segment_BT=torch.zeros_like(pos_BT))
    wanted = [x_BTD, *layer.parameters()]
    return forward_backward(lambda: layer(x_BTD, (), ctx)[0], wanted, bf16=supports_bf16())


def _awake(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.03)
    return layer
