"""A whole RWKV-7 block against an attention block of as many parameters, as in training.

RWKV-7 (time mix and channel mix) at a width of 512, against attention (rotary, SwiGLU) twice: our
own block, whose attention is native code too, and a layer of transformers' Llama, which is torch's
SDPA as everybody runs it. Forward and backward under bf16 autocast, with all gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import models, peers
from benchmarks.models import Size
from benchmarks.result import Findings, Gate
from benchmarks.timing import Announce, Call, Timing, best, side_by_side
from valkyrie_core.nn.block import Block, BlockConfig
from valkyrie_core.nn.state import Ctx

RWKV, ATTENTION, LLAMA = "RWKV-7 block", "our attention block", "Llama layer"
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

        calls: dict[str, Call] = {}
        for form in sizes.forms:
            calls[f"{RWKV} {form}"] = ours(sizes.size, "rwkv", form, window)
            calls[f"{ATTENTION} {form}"] = ours(sizes.size, "attn", form, window)
            try:
                calls[f"{LLAMA} {form}"] = llama(sizes.size, form, window)
            except peers.AbsentError as error:
                findings.absent[LLAMA] = str(error)
        timings = side_by_side(calls, repeats=window.repeats, announce=tell)
        findings.milliseconds(case, timings)
        _compare(findings, case, timings, GATES.get(window.tokens))
    counts = ", ".join(
        f"{name} {sum(p.numel() for p in build(sizes.size, kind).parameters()):,}"
        for name, kind in ((RWKV, "rwkv"), (ATTENTION, "attn"))
    )
    findings.notes.append(f"bf16 autocast; parameters: {counts}.")
    return findings


def _compare(findings: Findings, case: str, timings: dict[str, Timing], gate: Gate | None) -> None:
    """Each at its best, and eager against eager."""

    def of(kind: str) -> dict[str, Timing]:
        return {name: x for name, x in timings.items() if name.startswith(kind)}

    for kind in (LLAMA, ATTENTION):
        if of(kind):
            findings.compare("each at its best", case, best(of(RWKV)), best(of(kind)), gate)
            left, right = f"{RWKV} eager", f"{kind} eager"
            findings.compare("alike", case, (left, timings[left]), (right, timings[right]))


def build(size: Size, kind: str) -> Block:
    """A block from the middle of a model, its output matrices awake; kind is rwkv or attn."""
    torch.manual_seed(0)
    config = BlockConfig.model_validate(models.block_config(size, kind))
    block = Block(size.dim, config, "layer_norm", layer_idx=1, num_layers=size.layers)
    models.wake(block)
    return block


def ours(size: Size, kind: str, form: str, window: Window) -> Call:
    """One of our blocks, in the middle of a model: the first layer's values come from before it."""
    block = build(size, kind)
    function: Any = torch.compile(block, dynamic=False) if form == "compiled" else block
    x_BTD, pos_BT = _inputs(size, window)
    ctx = Ctx(pos_BT=pos_BT, segment_BT=torch.zeros_like(pos_BT))
    wanted = [x_BTD, *block.parameters()]
    if kind == "rwkv":
        first_BTD = nn.Parameter(torch.randn_like(x_BTD))
        ctx = ctx._replace(v_first_BTD=first_BTD)
        wanted.append(first_BTD)
    state = block.init_state(window.rows, device=torch.device("cpu"), dtype=torch.float32)
    return forward_backward(lambda: function(x_BTD, state, ctx)[0], wanted)


def llama(size: Size, form: str, window: Window) -> Call:
    """A layer of transformers' Llama.

    Raises:
        AbsentError: transformers is not installed.
    """
    layer, rotary = peers.llama_layer(size)
    function: Any = torch.compile(layer, dynamic=False) if form == "compiled" else layer
    x_BTD, pos_BT = _inputs(size, window)
    positions = rotary(x_BTD.detach(), pos_BT)

    def forward() -> Tensor:
        y_BTD = function(x_BTD, position_embeddings=positions)
        found: Tensor = y_BTD if isinstance(y_BTD, Tensor) else y_BTD[0]
        return found

    return forward_backward(forward, [x_BTD, *layer.parameters()])


def _inputs(size: Size, window: Window) -> tuple[nn.Parameter, Tensor]:
    shape = (window.rows, window.tokens, size.dim)
    generator = torch.Generator().manual_seed(0)
    x_BTD = nn.Parameter(torch.randn(shape, generator=generator))
    return x_BTD, torch.arange(window.tokens).expand(window.rows, -1)


def forward_backward(
    forward: Callable[[], Tensor], wanted: Sequence[Tensor], *, bf16: bool = True
) -> Call:
    """Output and gradients, both under the precision of training."""

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y_BTD = forward()
        torch.autograd.grad(y_BTD, wanted, torch.ones_like(y_BTD))

    return call
