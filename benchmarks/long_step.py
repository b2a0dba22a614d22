"""A training step over one sequence of 16384 tokens: its memory, and what recomputing saves."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import alone, models
from benchmarks.models import HYBRID, PURE, Size
from benchmarks.result import Findings
from benchmarks.timing import Announce
from valkyrie_core.machine import memory
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.train.allocator import keep_memory
from valkyrie_core.train.device import autocast, resolve_precision

PATTERNS = {"RWKV-7": PURE, "hybrid": HYBRID}
MODES = {"activations kept": False, "activation_checkpointing": True}
MEBIBYTE = 1 << 20
CPU = torch.device("cpu")


class Sizes(NamedTuple):
    """What a step reads."""

    size: Size
    tokens: int


FULL = Sizes(models.M12, 16384)
QUICK = Sizes(models.TINY, 1024)


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Mebibytes of peak memory beyond the model's own, and seconds, of forward and backward."""
    findings = Findings()
    which = "FULL" if sizes == FULL else "QUICK"
    for pattern in PATTERNS:
        for mode in MODES:
            announce(f"{pattern}, {mode}")
            peak, seconds = alone.call("benchmarks.long_step", "measure", pattern, mode, which)
            name = f"{pattern}, {mode}"
            findings.number(f"T={sizes.tokens}, peak", name, "MiB", peak)
            findings.number(f"T={sizes.tokens}, one step", name, "s", seconds)
    findings.notes.append(
        f"One sequence, forward and backward in {resolve_precision('auto', CPU)}, no optimizer, "
        "each in a process of its own: the peak less what it held before; the seconds of that one "
        "step, its first at this length, which say little about small differences."
    )
    return findings


def measure(pattern: str, mode: str, which: str) -> list[float]:
    """Mebibytes by which the peak of this process grows in one step, and the seconds it takes."""
    size, tokens = FULL if which == "FULL" else QUICK
    keep_memory()
    model = models.build(size, PATTERNS[pattern]).train()
    model.core.recomputes = MODES[mode]
    # native code and thread pools, which a process has but once; gradients stay, as in training
    _step(model, models.tokens(size, 1, 65))
    tokens_BT = models.tokens(size, 1, tokens + 1)
    before = memory.peak_memory()
    began = time.perf_counter()
    _step(model, tokens_BT)
    seconds = time.perf_counter() - began
    after = memory.peak_memory()
    if before is None or after is None:
        raise OSError("this system does not tell how much memory a process held")
    return [(after - before) / MEBIBYTE, seconds]


def _step(model: HybridLM, tokens_BT: Tensor) -> None:
    with autocast(resolve_precision("auto", CPU), CPU):
        loss, _, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(1))
    torch.autograd.backward(loss)
