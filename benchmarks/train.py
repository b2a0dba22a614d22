"""Training tokens per second: a 12M hybrid of RWKV-7 and attention against a Llama of its size.

Whole steps of 4096 tokens: loss, gradients, AdamW in one fused kernel. Every model is measured as
fast as it can be run without changing it, and the best of ours is set against the best of theirs.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import alone, models, peers, steps
from benchmarks.models import HYBRID, Size
from benchmarks.result import Findings, Gate
from benchmarks.timing import Announce, Call, Timing, best, side_by_side

EAGER, COMPILED = "hybrid bf16 eager", "hybrid bf16 compiled"
LLAMA_FP32, LLAMA, LLAMA_COMPILED = (
    "Llama fp32 eager",
    "Llama bf16 eager",
    "Llama bf16 compiled",
)
GATES = {512: Gate(1.15, 1.4), 2048: Gate(1.6, 2)}


class Sizes(NamedTuple):
    """What is trained, at which lengths, and who takes part."""

    size: Size
    lengths: tuple[int, ...]
    tokens: int
    """Of one step."""
    repeats: int
    names: tuple[str, ...]


FULL = Sizes(models.M12, (512, 2048), 4096, 7, (EAGER, COMPILED, LLAMA_FP32, LLAMA, LLAMA_COMPILED))
QUICK = Sizes(models.TINY, (128,), 512, 3, (EAGER, LLAMA_FP32, LLAMA))


def run(sizes: Sizes, announce: Announce) -> Findings:
    """Tokens per second of whole training steps."""
    findings = Findings()
    for length in sizes.lengths:
        case = f"T={length}"

        def tell(text: str, case: str = case) -> None:
            announce(f"{case}, {text}")

        calls = {name: build(name, sizes, length, findings) for name in sizes.names}
        timings = side_by_side(
            {name: call for name, call in calls.items() if call is not None},
            repeats=sizes.repeats,
            announce=tell,
        )
        findings.rates(case, timings, sizes.tokens, "tokens/s")
        _compare(findings, case, timings, GATES.get(length))
        tell("a process that gives freed memory back")
        findings.number(case, f"{EAGER}, memory given back", "tokens/s", plain(sizes, length))
    findings.notes.append(
        f"{sizes.tokens} tokens a step. Every process but that of the row 'memory given back' "
        "keeps the memory that a step frees (`valkyrie_core.train.allocator`)."
    )
    return findings


def _compare(findings: Findings, case: str, timings: dict[str, Timing], gate: Gate | None) -> None:
    """Each at its best, and eager against eager."""
    ours = {name: x for name, x in timings.items() if name.startswith("hybrid")}
    theirs = {name: x for name, x in timings.items() if name.startswith("Llama")}
    if theirs:
        findings.compare("each at its best", case, best(ours), best(theirs), gate)
    for left, right in ((EAGER, LLAMA), (COMPILED, LLAMA_COMPILED)):
        if left in timings and right in timings:
            pair = ((left, timings[left]), (right, timings[right]))
            findings.compare("alike", case, *pair)


def build(name: str, sizes: Sizes, length: int, findings: Findings) -> Call | None:
    """A peer's training step; None, and a line in the findings, where it is not installed."""
    windows_BT = models.tokens(sizes.size, sizes.tokens // length, length + 1)
    if name.startswith("hybrid"):
        ours = models.build(sizes.size, HYBRID)
        make = steps.our_compiled_loss if name == COMPILED else steps.our_loss
        return steps.step(ours, make(ours), windows_BT, "bf16")
    try:
        llama = peers.llama(sizes.size)
    except peers.AbsentError as error:
        findings.absent["Llama"] = str(error)
        return None
    loss = (steps.llama_compiled_loss if name == LLAMA_COMPILED else steps.llama_loss)(llama)
    return steps.step(llama, loss, windows_BT, "fp32" if name == LLAMA_FP32 else "bf16")


def plain(sizes: Sizes, length: int) -> float:
    """Tokens per second of our eager step in a fresh process, with the allocator as it comes."""
    which = "FULL" if sizes == FULL else "QUICK"
    return alone.call("benchmarks.train", "measure_plain", which, length)[0]


def measure_plain(which: str, length: int) -> list[float]:
    """What `plain` runs in its process."""
    sizes: Sizes = {"FULL": FULL, "QUICK": QUICK}[which]
    call = build(EAGER, sizes, length, Findings())
    assert call is not None
    timing = side_by_side({EAGER: call}, repeats=sizes.repeats, announce=lambda _: None)[EAGER]
    return [timing.rate(sizes.tokens).median]
