"""How fast this machine moves memory, and how long it takes to start an operation.

    python -m valkyrie_core.machine.rates bandwidth|operation DEVICE THREADS FILE

measures one of both. It is always done so, in a process of its own.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from valkyrie_core.machine.apart import run_apart
from valkyrie_core.machine.hardware import processor_key, synchronize
from valkyrie_core.machine.measured import measured

COPIED_BYTES = 1 << 27
"""Of one copy: beyond the caches of most processors."""


def memory_bandwidth(*, cache_dir: Path | None = None, device: str = "cpu") -> float:
    """Bytes per second that are read and written together; measured once, in some seconds.

    It bounds decoding, which reads all weights for every token, and whatever computes little with
    much: norms, updates of weights.
    """
    return _kept("bandwidth", device, cache_dir)


def operation_seconds(*, cache_dir: Path | None = None, device: str = "cpu") -> float:
    """Seconds that an operation takes which has next to nothing to compute."""
    return _kept("operation", device, cache_dir)


def _kept(rate: str, device: str, cache_dir: Path | None) -> float:
    def measure() -> dict[str, float]:
        threads = str(torch.get_num_threads())
        return {"value": float(run_apart(__name__, rate, device, threads))}

    key = "|".join((processor_key(device), device, rate))
    return measured(key, ("value",), measure, cache_dir=cache_dir)["value"]


def measure_bandwidth(*, device: str = "cpu", repeats: int = 5) -> float:
    """Times copies of 128 MiB by all threads and keeps the best."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    # the first one maps the pages
    for _ in range(repeats + 1):
        synchronize(source.device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(source.device)
        best = max(best, 2 * COPIED_BYTES / max(time.perf_counter() - began, 1e-9))
    return best


def measure_operation(*, device: str = "cpu", count: int = 300, repeats: int = 5) -> float:
    """Times a chain of tiny linear layers, forward and backward; keeps the best per operation."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False, device=device) for _ in range(count)))
    x = torch.ones(1, 4, device=device, requires_grad=True)
    best = float("inf")
    for _ in range(repeats):
        synchronize(x.device)
        began = time.perf_counter()
        torch.autograd.backward(layers(x).sum())
        synchronize(x.device)
        # of each layer one product forward, two backward, and a sum of gradients
        best = min(best, (time.perf_counter() - began) / (4 * count))
    return best


def main(rate: str, device: str, threads: str, answer: str) -> None:
    """Measures here and writes down the number."""
    torch.set_num_threads(int(threads))
    measure = {"bandwidth": measure_bandwidth, "operation": measure_operation}[rate]
    Path(answer).write_text(repr(measure(device=device)), encoding="ascii")


if __name__ == "__main__":
    main(*sys.argv[1:])
