"""Where the time of a training step goes: the steps of `benchmarks/train.py`, by what is done.

torch's profiler tells per operator the time that it spent itself; a kind is a set of operators.
Steps are eager: what compiling fuses would have no kind.
"""

from __future__ import annotations

import re
from statistics import median
from typing import NamedTuple

import torch

from benchmarks import train
from benchmarks.result import Findings
from benchmarks.timing import Announce, Call

KINDS = {
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm)$",
    "WKV-7 with its gates, norms and read-out": r"time_mix|wkv7",
    "attention": r"attention",
    "token shift": r"shift_mix",
    "rotary positions, key and query norms": r"norm_rope",
    "activations of the channel mixers": r"relu_squared|silu",
    "loss without its products": r"cross_entropy|log_softmax|nll_loss",
    "layer norms": r"layer_norm|rms_norm",
    "optimizer": r"adamw",
    "copies and casts": r"aten::(copy_|cat|fill_|clone|_to_copy)$",
}
"""Kinds of work, and the operators that do it; the first one that matches counts."""
REST = "all else: sums, products by element, Python"


class Sizes(NamedTuple):
    """Which steps, at which lengths, and how many of each."""

    train: train.Sizes
    names: tuple[str, ...]
    repeats: int


FULL = Sizes(train.FULL, (train.EAGER, train.LLAMA), 5)
QUICK = Sizes(train.QUICK, (train.EAGER, train.LLAMA), 2)


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Per kind of work the milliseconds of a step, and its share of the step."""
    findings = Findings()
    found: dict[str, dict[str, float]] = {}
    for length in sizes.train.lengths:
        for name in sizes.names:
            announce(f"{name}, T={length}")
            call = train.build(name, sizes.train, length, findings)
            if call is not None:
                found[f"{name} T={length}"] = split(call, sizes.repeats)
    for unit in ("ms", "%"):
        for kind in (*KINDS, REST):
            for case, times in found.items():
                whole = sum(times.values()) / 100 if unit == "%" else 1.0
                if times[kind] > 0:
                    findings.number(case, kind, unit, times[kind] / whole)
    for case, times in found.items():
        findings.number(case, "together", "ms", sum(times.values()))
    findings.notes.append(
        f"Medians of {sizes.repeats} steps of {sizes.train.tokens} tokens after two that warm up; "
        "in the hybrid two of eight layers are attention, in the Llama all eight. The Llama's "
        "norms and rotary positions are made of sums and products by element."
    )
    return findings


def split(call: Call, repeats: int) -> dict[str, float]:
    """The median milliseconds that a call spends on each kind of work."""
    call()
    call()
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        times = dict.fromkeys((*KINDS, REST), 0.0)
        for event in profile.key_averages():
            times[kind_of(event.key)] += event.self_cpu_time_total / 1e3
        rounds.append(times)
    return {kind: median(times[kind] for times in rounds) for kind in rounds[0]}


def kind_of(operator: str) -> str:
    """The kind of work that an operator does, by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, operator, re.IGNORECASE):
            return kind
    return REST
