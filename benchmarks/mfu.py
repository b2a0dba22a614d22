"""What share of the measured bf16 matmul peak training reaches: 50M models, windows of 512.

Model FLOPs are those that the formulas need: 2 per weight and token in every matrix and low-rank
map, 9 per element of a WKV-7 state, 2 T per channel of causal attention; three times that for
forward and backward. The head counts, the embedding's look-up does not. Work done twice, such as
logits or states that the backward pass makes again, is not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import alone, models, peers, steps
from benchmarks.models import HYBRID, PURE, Size
from benchmarks.result import Findings, Gate
from benchmarks.timing import Announce, Call, Spread, side_by_side
from valkyrie_core.kernels import attention
from valkyrie_core.machine import hardware
from valkyrie_core.machine.hardware import measure_matmul

PATTERNS = {"RWKV-7": PURE, "hybrid": HYBRID}
LLAMA = "Llama"
GATE = Gate(60, 72)


class Sizes(NamedTuple):
    """What is trained, and in which forms: eager, compiled."""

    size: Size
    context_len: int
    tokens: int
    """Of one step."""
    repeats: int
    forms: tuple[str, ...]


FULL = Sizes(models.M50, 512, 4096, 5, ("eager", "compiled"))
QUICK = Sizes(models.TINY, 128, 512, 3, ("eager",))


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Tokens per second, and the share of the peak that they are."""
    findings = Findings()
    calls: dict[str, Call] = {}
    flops: dict[str, float] = {}
    for name in (*PATTERNS, LLAMA):
        announce(f"building {name}")
        for form in sizes.forms:
            label = f"{name} bf16 {form}"
            try:
                calls[label] = build(sizes, name, form)
            except peers.AbsentError as error:
                findings.absent[LLAMA] = str(error)
                continue
            flops[label] = flops_per_token(sizes, name)
    for name, pattern in PATTERNS.items():
        label = f"{name}, its matrix products alone"
        calls[label] = steps.products(models.build(sizes.size, pattern), sizes.tokens)
        flops[label] = flops_per_token(sizes, name)
    announce("matmul peak")
    peak = measure_matmul("bf16")
    timings = side_by_side(calls, repeats=sizes.repeats, announce=announce)
    # the better of before and after: a busy minute must not flatter us
    peak = max(peak, measure_matmul("bf16"), key=lambda x: x.flops_per_second)
    case = f"T={sizes.context_len}"
    findings.rates(case, timings, sizes.tokens, "tokens/s")
    findings.number(case, "bf16 matmul peak", "GFLOP/s", peak.flops_per_second / 1e9)
    for label, timing in timings.items():
        work = 100 * flops[label] * sizes.tokens / peak.flops_per_second
        # the last two are the limit and no training, Llama is no promise of ours
        gate = GATE if label.endswith(sizes.forms) and not label.startswith(LLAMA) else None
        against = f"matmul peak ({peak.size}x{peak.size})"
        findings.share("model FLOPs", case, label, against, Spread(*timing.rate(work)), gate)
    if "amx_bf16" in hardware.cpu().flags:
        announce("hybrid without AMX")
        _without_tiles(sizes, case, findings)
    counted = ", ".join(
        f"{name} {flops_per_token(sizes, name) / 1e6:.0f}" for name in (*PATTERNS, LLAMA)
    )
    findings.notes.append(
        f"{sizes.tokens} tokens a step, AdamW included. MFLOP per token: {counted}."
    )
    findings.notes.append(
        "'Its matrix products alone' is the limit: the products of a step in bf16 at the model's "
        "own shapes, with nothing between them; the same model FLOPs are counted for it."
    )
    return findings


def _without_tiles(sizes: Sizes, case: str, findings: Findings) -> None:
    """Adds the share of the peak that AVX-512 alone has, as on a processor without matrix tiles."""
    which = "FULL" if sizes == FULL else "QUICK"
    shares = alone.call(
        "benchmarks.mfu",
        "measure_without_tiles",
        which,
        environment={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    )
    spread, gate = Spread.of(shares), GATE
    label = "hybrid bf16 eager, AMX switched off"
    findings.share("model FLOPs", case, label, "the matmul peak without AMX", spread, gate)


def measure_without_tiles(which: str) -> list[float]:
    """Per round, the percentage of the peak; oneDNN is told by the environment, ours here."""
    sizes = FULL if which == "FULL" else QUICK
    attention.has_amx = lambda: False  # type: ignore[assignment]
    calls = {"hybrid": build(sizes, "hybrid", "eager")}
    peak = measure_matmul("bf16").flops_per_second
    timing = side_by_side(calls, repeats=3, announce=lambda _: None)["hybrid"]
    peak = max(peak, measure_matmul("bf16").flops_per_second)
    work = 100 * flops_per_token(sizes, "hybrid") * sizes.tokens / peak
    return [work / seconds for seconds in timing.seconds]


def build(sizes: Sizes, name: str, form: str) -> Call:
    """A training step under bf16 autocast.

    Raises:
        AbsentError: transformers is not installed.
    """
    windows_BT = models.tokens(sizes.size, sizes.tokens // sizes.context_len, sizes.context_len + 1)
    if name == LLAMA:
        llama = peers.llama(sizes.size)
        make = steps.llama_compiled_loss if form == "compiled" else steps.llama_loss
        return steps.step(llama, make(llama), windows_BT, "bf16")
    model = models.build(sizes.size, PATTERNS[name])
    ours = steps.our_compiled_loss if form == "compiled" else steps.our_loss
    return steps.step(model, ours(model), windows_BT, "bf16")


def flops_per_token(sizes: Sizes, name: str) -> float:
    """Of a training step, as our models count them; Llama's by the same rules."""
    size = sizes.size
    if name != LLAMA:
        model = models.build(size, PATTERNS[name])
        return 3 * sum(model.flops_per_token(sizes.context_len).values())
    matrices = size.layers * (4 * size.dim**2 + 3 * size.dim * size.swiglu)
    attention = 2 * sizes.context_len * size.dim * size.layers
    return 3 * (2 * (matrices + size.vocab_size * size.dim) + attention)
