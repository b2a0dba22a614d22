"""Planning, wired to what is known of this machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import torch

from valkyrie_core.cache import cache_dir
from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.machine.hardware import cpu, matmul_peak, processor_key
from valkyrie_core.machine.measured import measured
from valkyrie_core.machine.memory import available_memory
from valkyrie_core.machine.rates import memory_bandwidth, operation_seconds
from valkyrie_core.plan.recipe_plan import Budget, Here, make_plan
from valkyrie_core.plan.seconds import Rates
from valkyrie_core.recipe import Recipe
from valkyrie_core.report.plan import PlanReport
from valkyrie_core.runs.process_memory import measure_held_bytes
from valkyrie_core.train.device import resolve_device, resolve_precision

log = logging.getLogger("valkyrie")

MOST = 2.0**62
"""Bytes; more is the same to a plan."""
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(|B|[kKMGT]i?B?)")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_memory(text: str) -> int:
    """Bytes of "24GiB" (powers of 1024), "24GB" (of 1000) or "25769803776".

    Raises:
        UsageError: it is no amount of memory, or none at all.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is no amount of memory", hint="write 24GiB, 24GB, 512MiB or bytes"
        )
    unit = match[2].rstrip("B")
    base = 1024 if unit.endswith("i") else 1000
    size = min(float(match[1]), MOST) * base ** _POWERS[unit.rstrip("i").upper()]
    size = int(min(size, MOST))
    if size < 1:
        raise UsageError(f"{text!r} is no memory at all", hint="write 24GiB, 24GB or 512MiB")
    return size


def plan_recipe(
    recipe: Recipe, *, memory: str | int | None, progress: Callable[[str], None] | None
) -> PlanReport:
    """See `valkyrie_core.runs.plan`."""
    budget = None
    if memory is not None:
        budget = Budget(memory if isinstance(memory, int) else parse_memory(memory), asked=True)
    here = examine(recipe, progress or (lambda _what: None))
    if budget is None and here.memory is not None and here.held is not None:
        budget = Budget(here.memory, asked=False)
    if progress is not None:
        progress("a training step, traced without data")
    return make_plan(recipe, here, budget, threads=torch.get_num_threads())


def examine(
    recipe: Recipe,
    progress: Callable[[str], None] = lambda _what: None,
    *,
    measure_held: bool = True,
) -> Here:
    """This machine as a recipe will find it; what was not measured before is measured now.

    Args:
        progress: told what is being looked at.
        measure_held: else what a training process holds is only known where it was measured before.
    """
    try:
        device = resolve_device(recipe.device)
    except MissingError as error:
        # asking before one has the device is what a plan is for
        log.warning("%s: planned for its processor", error.message)
        device = torch.device("cpu")
    precision = resolve_precision(recipe.train.precision, device)
    cache, name = cache_dir(), str(device)
    progress("measured rates of this machine")
    rates = Rates(
        matmul_peak(precision, cache_dir=cache, device=name).flops_per_second,
        memory_bandwidth(cache_dir=cache, device=name),
        operation_seconds(cache_dir=cache, device=name),
    )
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Here(name, torch.cuda.get_device_name(device), precision, rates, free, None)
    if measure_held:
        progress("what a training process holds beside its tensors")
    held = _held(measure_held_bytes if measure_held else _unknown)
    return Here(name, cpu().model, precision, rates, available_memory(), held)


def _unknown() -> int:
    raise OSError("what a training process holds was not measured yet: valkyrie plan does")


def _held(find: Callable[[], int]) -> int | None:
    def measure() -> dict[str, float]:
        return {"bytes": find()}

    try:
        key = f"{processor_key()}|cpu|held"
        return int(measured(key, ("bytes",), measure, cache_dir=cache_dir())["bytes"])
    except OSError as error:
        log.warning("%s; the peak of the process is not predicted", error)
        return None
