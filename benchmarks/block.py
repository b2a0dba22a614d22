"""A whole RWKV-7 block against an attention block of as many parameters, as in training.

RWKV-7 (time mix and channel mix) and attention (rotary, QK norm, SwiGLU) at a width of 512, forward
and backward under bf16 autocast, gradients of weights and inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import models
from benchmarks.models import Size
from benchmarks.result import Findings, Gate
from benchmarks.timing import Announce, Call, best, side_by_side
from valkyrie_core.nn.block import Block, BlockConfig
from valkyrie_core.nn.state import Ctx

RWKV, ATTENTION = "RWKV-7 block", "attention block"
KINDS = {RWKV: "rwkv", ATTENTION: "attn"}
GATES = {512: Gate(1.0, 1.2), 4096: Gate(1.7, 2.5)}


class Window(NamedTuple):
    """Rows of so many tokens, and how often they are measured."""

    rows: int
    tokens: int
    repeats: int


class Sizes(NamedTuple):
    """What is measured, and in which forms: eager, compiled."""

    size: Size
    windows: tuple[Window, ...]
    forms: tuple[str, ...]


FULL = Sizes(
    models.M50, (Window(1, 512, 15), Window(8, 512, 9), Window(1, 4096, 9)), ("eager", "compiled")
)
QUICK = Sizes(models.TINY, (Window(1, 128, 3), Window(2, 256, 3)), ("eager",))


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Milliseconds of forward and backward."""
    findings = Findings()
    for window in sizes.windows:
        case = f"B={window.rows} T={window.tokens}"

        def tell(text: str, case: str = case) -> None:
            announce(f"{case}, {text}")

        calls = {
            f"{name} {form}": forward_backward(sizes.size, kind, form, window)
            for form in sizes.forms
            for name, kind in KINDS.items()
        }
        timings = side_by_side(calls, repeats=window.repeats, announce=tell)
        findings.milliseconds(case, timings)
        ours = best({name: x for name, x in timings.items() if name.startswith(RWKV)})
        theirs = best({name: x for name, x in timings.items() if name.startswith(ATTENTION)})
        findings.compare("each at its best", case, ours, theirs, GATES.get(window.tokens))
        left, right = f"{RWKV} eager", f"{ATTENTION} eager"
        findings.compare("alike", case, (left, timings[left]), (right, timings[right]))
    counts = ", ".join(
        f"{name} {sum(p.numel() for p in build(sizes.size, kind).parameters()):,}"
        for name, kind in KINDS.items()
    )
    findings.notes.append(f"bf16 autocast; parameters: {counts}.")
    return findings


def build(size: Size, kind: str) -> Block:
    """A block from the middle of a model, its output matrices awake."""
    torch.manual_seed(0)
    config = BlockConfig.model_validate(models.block_config(size, kind))
    block = Block(size.dim, config, "layer_norm", layer_idx=1, num_layers=size.layers)
    models.wake(block)
    return block


def forward_backward(size: Size, kind: str, form: str, window: Window) -> Call:
    """A block's output and all its gradients."""
    block = build(size, kind)
    function: Any = torch.compile(block, dynamic=False) if form == "compiled" else block
    shape = (window.rows, window.tokens, size.dim)
    x_BTD = nn.Parameter(torch.randn(shape))
    first_BTD = nn.Parameter(torch.randn(shape))
    gradient_BTD = torch.randn(shape)
    pos_BT = torch.arange(window.tokens).expand(window.rows, -1)
    ctx = Ctx(pos_BT=pos_BT, segment_BT=torch.zeros_like(pos_BT))
    if kind == "rwkv":
        ctx = ctx._replace(v_first_BTD=first_BTD)
    state = block.init_state(window.rows, device=torch.device("cpu"), dtype=torch.float32)
    wanted = [x_BTD, *([first_BTD] if kind == "rwkv" else []), *block.parameters()]

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y_BTD = function(x_BTD, state, ctx)[0]
        torch.autograd.grad(y_BTD, wanted, gradient_BTD)

    return call
