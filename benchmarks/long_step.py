"""A training step over one sequence of 16384 tokens: its memory, and what recomputing saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import alone, models
from benchmarks.models import HYBRID, PURE, Size
from benchmarks.result import Findings
from benchmarks.timing import Announce, side_by_side
from valkyrie_core.plan import memory
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
    repeats: int


FULL = Sizes(models.M12, 16384, 3)
QUICK = Sizes(models.TINY, 1024, 2)


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Milliseconds of forward and backward, and mebibytes of peak memory beyond the model's own."""
    findings = Findings()
    case = f"T={sizes.tokens}"
    for pattern in PATTERNS:
        steps = {
            f"{pattern}, {mode}": _step(sizes, pattern, recomputes)
            for mode, recomputes in MODES.items()
        }
        timings = side_by_side(steps, repeats=sizes.repeats, warm_up=1, announce=announce)
        findings.milliseconds(case, timings)
        kept, again = timings.items()
        findings.compare("activations kept against recomputed", case, kept, again)
        for mode in MODES:
            announce(f"memory of {pattern}, {mode}")
            which = "FULL" if sizes == FULL else "QUICK"
            peak = alone.call("benchmarks.long_step", "measure_memory", pattern, mode, which)[0]
            findings.number(f"{case}, peak", f"{pattern}, {mode}", "MiB", peak)
    precision = resolve_precision("auto", CPU)
    findings.notes.append(
        f"One sequence, forward and backward in {precision}, no optimizer. Memory: the peak of a "
        "process of its own, less what it held once its model was there."
    )
    return findings


def _step(sizes: Sizes, pattern: str, recomputes: bool) -> Callable[[], None]:
    model = models.build(sizes.size, PATTERNS[pattern]).train()
    model.core.recomputes = recomputes
    tokens_BT = models.tokens(sizes.size, 1, sizes.tokens + 1)
    precision = resolve_precision("auto", CPU)

    def step() -> None:
        with autocast(precision, CPU):
            loss, _, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(1))
        torch.autograd.backward(loss)

    return step


def measure_memory(pattern: str, mode: str, which: str) -> list[float]:
    """Mebibytes by which the peak of this process grows in one step."""
    sizes = FULL if which == "FULL" else QUICK
    keep_memory()
    # what a process has but once
    _step(sizes._replace(tokens=64), pattern, MODES[mode])()
    step = _step(sizes, pattern, MODES[mode])
    before = memory.peak_memory()
    step()
    after = memory.peak_memory()
    if before is None or after is None:
        raise OSError("this system does not tell how much memory a process held")
    return [(after - before) / MEBIBYTE]
