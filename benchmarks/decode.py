"""Writing tokens one by one, and reading a prompt of 256: 50M models, batch 1.

Our engine, llama.cpp and the author's `rwkv` package run the same RWKV-7 with the same random
weights; before anything is timed their scores are compared. transformers runs a Llama of as many
parameters. All choose the likeliest token; none of them stops early.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import limits, models, runners
from benchmarks.models import PURE, Size
from benchmarks.result import Findings, Gate
from benchmarks.runners import Runner
from benchmarks.timing import Announce, Timing, best, side_by_side
from valkyrie_core.infer.engine import Engine
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.weights import Weights

WEIGHTS: tuple[Weights, ...] = ("fp32", "bf16", "int8")
LLAMA_CPP, PACKAGE, TRANSFORMERS = "llama.cpp", "rwkv package", "transformers Llama"
WRITING = {
    ("bf16", f"{LLAMA_CPP} bf16"): Gate(0.8, 1.4),
    ("int8", f"{LLAMA_CPP} q8_0"): Gate(0.8, 1.5),
    ("bf16", f"{TRANSFORMERS} bf16"): Gate(4, 6),
    ("int8", f"{TRANSFORMERS} bf16"): Gate(5, 8),
    ("fp32", f"{LLAMA_CPP} f32"): None,
    ("fp32", f"{PACKAGE} fp32"): None,
}
READING = Gate(1.2, 2)
AGREEMENT = {"f32": 1e-4, "fp32": 1e-4, "bf16": 0.03, "q8_0": 0.03}
"""How far scores may be from ours in fp32, relative to the largest: else it is another model."""


class Sizes(NamedTuple):
    """What is written and read."""

    size: Size
    write: int
    read: int
    repeats: int


FULL = Sizes(models.M50, 64, 256, 9)
QUICK = Sizes(models.TINY, 16, 64, 3)


def engine(model: HybridLM, weights: Weights) -> Engine:
    """Our engine with its weights in a format; what is not fp32 reads prompts in bf16."""
    return Engine(model, weights=weights, precision="fp32" if weights == "fp32" else "bf16")


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Tokens per second, writing and reading."""
    findings = Findings()
    announce("building")
    writers, readers = _runners(sizes, findings)
    prompt = models.tokens(sizes.size, 1, sizes.read)[0].tolist()
    check_agreement(readers, prompt[:64], findings)
    written = side_by_side(
        {name: partial(runner.write, sizes.write) for name, runner in writers.items()},
        repeats=sizes.repeats,
        announce=lambda text: announce(f"writing, {text}"),
    )
    findings.rates("writing", written, sizes.write, "tokens/s")
    for (weights, theirs), gate in WRITING.items():
        ours = f"ours {weights}"
        if theirs in written:
            pair = ((ours, written[ours]), (theirs, written[theirs]))
            findings.compare("writing", "batch 1", *pair, gate)
    findings.notes.append(_limit(sizes, written))
    read = side_by_side(
        {name: partial(runner.read, prompt) for name, runner in readers.items()},
        repeats=sizes.repeats,
        announce=lambda text: announce(f"reading, {text}"),
    )
    case = f"reading {sizes.read}"
    findings.rates(case, read, sizes.read, "tokens/s")
    _compare_reading(findings, case, read)
    return findings


def _runners(sizes: Sizes, findings: Findings) -> tuple[dict[str, Runner], dict[str, Runner]]:
    """Who writes, and who reads."""
    model = models.build(sizes.size, PURE).eval()
    writers = {f"ours {x}": runners.ours(engine(model, x)) for x in WEIGHTS}
    readers = dict(writers)

    def add(peer: str, name: str, make: Callable[[], Runner], *groups: dict[str, Runner]) -> None:
        try:
            runner = make()
        except runners.AbsentError as error:
            findings.absent[peer] = str(error)
            return
        for group in groups:
            group[f"{peer} {name}"] = runner

    for format in ("f32", "bf16", "q8_0"):
        safe = runners.llama_cpp_reads_tiles(format)
        groups = (writers, readers) if safe else (writers,)
        add(LLAMA_CPP, format, partial(runners.llama_cpp, model, format), *groups)
        if not safe:
            plain = partial(runners.llama_cpp, model, format, repack=False)
            add(LLAMA_CPP, f"{format} without AMX", plain, readers)
            findings.notes.append(
                f"{LLAMA_CPP} {format} writes with its AMX tiles and reads without them: "
                "with them it crashes on a prompt (ggml-org/llama.cpp issue 20824)."
            )
    for name in ("fp32", "bf16"):
        package = partial(runners.rwkv_package, model, name)
        add(PACKAGE, name, package, writers, readers)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        llama = partial(runners.generate, sizes.size, dtype)
        add(TRANSFORMERS, name, llama, writers, readers)
    return writers, readers


def _limit(sizes: Sizes, written: dict[str, Timing]) -> str:
    """How far our writing is from the limit that memory sets."""
    parameters = models.build(sizes.size, PURE).parameters()
    weights = sum(x.numel() for x in parameters if x.dim() == 2 and min(x.shape) > 1)
    told = ", ".join(
        f"{name} {bytes * written[f'ours {name}'].rate(sizes.write * weights).median / 1e9:.1f}"
        for name, bytes in (("fp32", 4), ("bf16", 2), ("int8", 1))
    )
    most = limits.read_bytes_per_second() / 1e9
    return (
        f"Limit: a token reads every matrix once. In GB/s that is {told}; a plain sum over "
        f"{limits.READ_BYTES >> 30} GiB reads {most:.1f}."
    )


def check_agreement(readers: dict[str, Runner], prompt: list[int], findings: Findings) -> None:
    """Compares the scores after a prompt of those who run our weights.

    Raises:
        ValueError: a peer with our weights does not give our scores.
    """
    expected_V = readers["ours fp32"].read(prompt)
    far: dict[str, float] = {}
    for name, runner in readers.items():
        if name.startswith((LLAMA_CPP, PACKAGE)):
            far[name] = distance(runner.read(prompt), expected_V)
            kind = name.removeprefix(LLAMA_CPP).removeprefix(PACKAGE).split()[0]
            if far[name] > AGREEMENT[kind]:
                raise ValueError(f"{name} gives other scores than ours: off by {far[name]:.2g}")
    if far:
        told = ", ".join(f"{name} {value:.1e}" for name, value in far.items())
        findings.notes.append(
            f"Scores after {len(prompt)} tokens against ours in fp32, largest difference over "
            f"largest score: {told}."
        )


def distance(scores_V: Tensor, expected_V: Tensor) -> float:
    """The largest difference, relative to the largest score."""
    return float((scores_V - expected_V).abs().max() / expected_V.abs().max())


def _compare_reading(findings: Findings, case: str, read: dict[str, Timing]) -> None:
    """Each at its best."""
    ours = best({name: x for name, x in read.items() if name.startswith("ours")})
    for peer in (LLAMA_CPP, PACKAGE, TRANSFORMERS):
        theirs = {name: x for name, x in read.items() if name.startswith(peer)}
        if theirs:
            gate = READING if peer == LLAMA_CPP else None
            findings.compare("reading, each at its best", case, ours, best(theirs), gate)
