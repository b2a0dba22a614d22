"""Reading 16384 tokens: the time against a Llama, and the memory as the text grows.

Recurrent layers keep a state of one size, so what a chunk needs is all they ever need; attention
keeps the keys and values of every token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from benchmarks import alone, decode, limits, models, runners
from benchmarks.models import HYBRID, PURE, Size
from benchmarks.result import Findings, Gate
from benchmarks.runners import Runner
from benchmarks.timing import Announce, best, side_by_side
from valkyrie_core.machine import memory
from valkyrie_core.machine.hardware import Precision

WEIGHTS: tuple[Precision, ...] = ("fp32", "bf16")
PATTERNS = {"RWKV-7": PURE, "hybrid": HYBRID}
LLAMA_DTYPES = {"Llama fp32": torch.float32, "Llama bf16": torch.bfloat16}
GATES = {16384: Gate(4, 6)}
MEBIBYTE = 1 << 20


class Sizes(NamedTuple):
    """What is read."""

    size: Size
    tokens: int
    memory_tokens: tuple[int, ...]
    """Lengths at which the peak memory is taken."""
    repeats: int


FULL = Sizes(models.M50, 16384, (4096, 16384), 3)
QUICK = Sizes(models.TINY, 1024, (1024, 2048), 2)
WARM_UP = 1024
"""Tokens read before memory is watched: two chunks of the engine, one after the other."""


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Milliseconds of one prompt, and mebibytes of peak memory beyond the model's own."""
    findings = Findings()
    case = f"T={sizes.tokens}"
    prompt = models.tokens(sizes.size, 1, sizes.tokens)[0].tolist()
    readers = _readers(sizes, findings)
    timings = side_by_side(
        {name: partial(runner.read, prompt) for name, runner in readers.items()},
        repeats=sizes.repeats,
        warm_up=1,
        announce=announce,
    )
    findings.milliseconds(case, timings)
    theirs = {name: x for name, x in timings.items() if name.startswith("Llama")}
    for pattern in PATTERNS:
        ours = {name: x for name, x in timings.items() if name.startswith(pattern)}
        if theirs:
            # of a hybrid's layers a quarter is attention: it was promised nothing
            gate = GATES.get(sizes.tokens) if pattern == "RWKV-7" else None
            findings.compare("each at its best", case, best(ours), best(theirs), gate)
            for weights in WEIGHTS:
                left, right = f"{pattern} {weights}", f"Llama {weights}"
                pair = ((left, timings[left]), (right, timings[right]))
                findings.compare("alike", case, *pair)
    best_weights = min(WEIGHTS, key=lambda x: timings[f"RWKV-7 {x}"].spread.median)
    # the head reads the last token only
    model = models.build(sizes.size, PURE)
    by_part = model.flops_per_token(sizes.tokens)
    flops = sizes.tokens * (sum(by_part.values()) - by_part["head"])
    rate = timings[f"RWKV-7 {best_weights}"].rate(flops).median
    findings.notes.append(
        f"Limit: RWKV-7 {best_weights} does {limits.of_matmul_peak(rate, best_weights)}."
    )
    _measure_memory(sizes, (*PATTERNS, *(["Llama fp32"] if theirs else [])), findings, announce)
    return findings


def _measure_memory(
    sizes: Sizes, names: tuple[str, ...], findings: Findings, announce: Announce
) -> None:
    """Adds peaks, and a sentence on how they grow."""
    growth = {}
    for name in names:
        peaks = []
        for length in sizes.memory_tokens:
            announce(f"memory of {name} at {length} tokens")
            peaks.append(peak_memory(name, sizes, length))
            findings.number(f"T={length}", f"{name}, peak beyond the model", "MiB", peaks[-1])
        growth[name] = peaks[-1] - peaks[0]
    findings.notes.append(
        "Memory: the peak of a process of its own that reads one prompt in fp32, less the peak "
        f"after its model was built and had read {WARM_UP} tokens."
    )
    told = ", ".join(f"{name} {value:+.1f} MiB" for name, value in growth.items())
    first, last = sizes.memory_tokens[0], sizes.memory_tokens[-1]
    findings.notes.append(f"From {first} to {last} tokens the peak grows by: {told}.")


def _readers(sizes: Sizes, findings: Findings) -> dict[str, Runner]:
    readers: dict[str, Runner] = {}
    for name, pattern in PATTERNS.items():
        model = models.build(sizes.size, pattern).eval()
        for weights in WEIGHTS:
            readers[f"{name} {weights}"] = runners.ours(decode.engine(model, weights))
    for name, dtype in LLAMA_DTYPES.items():
        try:
            readers[name] = runners.generate(sizes.size, dtype)
        except runners.AbsentError as error:
            findings.absent["Llama"] = str(error)
    return readers


def peak_memory(name: str, sizes: Sizes, tokens: int) -> float:
    """See `measure_memory`, in a fresh process."""
    which = "FULL" if sizes == FULL else "QUICK"
    return alone.call("benchmarks.prefill", "measure_memory", name, which, tokens)[0]


def measure_memory(name: str, which: str, tokens: int) -> list[float]:
    """Mebibytes by which the peak grows while a prompt is read."""
    size = (FULL if which == "FULL" else QUICK).size
    if name in PATTERNS:
        runner = runners.ours(decode.engine(models.build(size, PATTERNS[name]).eval(), "fp32"))
    else:
        runner = runners.generate(size, LLAMA_DTYPES[name])
    runner.read(models.tokens(size, 1, WARM_UP)[0].tolist())
    before = memory.peak_memory()
    runner.read(models.tokens(size, 1, tokens)[0].tolist())
    after = memory.peak_memory()
    if before is None or after is None:
        raise OSError("this system does not tell how much memory a process held")
    return [(after - before) / MEBIBYTE]
