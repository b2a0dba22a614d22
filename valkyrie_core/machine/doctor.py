"""Looks over the machine: what works, what is missing, and for what."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from valkyrie_core.config import Config
from valkyrie_core.errors import ValkyrieError
from valkyrie_core.machine import hardware

Status = Literal["ok", "warn", "fail"]
PYTHON_FLOOR = (3, 11)
TORCH_FLOOR = (2, 10)
LEAST_FREE_BYTES = 1 << 30
SelfTest = Callable[[], tuple[float, float]]


class Check(Config):
    """One thing that was looked at."""

    status: Status
    """ok; warn: works, with less; fail: something will not work."""
    what: str
    """What was looked at."""
    detail: str
    """What was found."""
    fix: str | None = None
    """What to do about it."""


def examine(
    *,
    runs_dir: Path,
    cache_dir: Path,
    kernels: object,
    self_test: SelfTest,
    device: str = "cpu",
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Check]:
    """Every check, in the order in which a person would ask; no check ends the others.

    Args:
        runs_dir: where runs will be written; need not exist yet.
        cache_dir: where data sets and measured peaks are kept.
        kernels: the kernels package; `available()` in it gives the form of WKV-7 that will run
            and, where that is not the native one, why.
        self_test: trains one step and gives the loss before and after it.
        device: what to measure.
        refresh: measure the matmul peak again.
        progress: called with the name of a check before it is made.
    """
    checks: list[tuple[str, Callable[[], Check | list[Check]]]] = [
        ("python", check_python),
        ("torch", check_torch),
        ("threads", check_threads),
        ("devices", check_devices),
        ("bf16", lambda: check_bf16(device)),
        ("kernels", lambda: check_kernels(kernels)),
        ("matmul peak", lambda: check_peaks(cache_dir, device=device, refresh=refresh)),
        ("disk", lambda: check_disk(runs_dir)),
        ("cache", lambda: check_cache(cache_dir)),
        ("pip", check_pip),
        ("extras", check_extras),
        ("self test", lambda: check_training(self_test)),
    ]
    found: list[Check] = []
    for what, check in checks:
        if progress is not None:
            progress(what)
        try:
            result = check()
        except (ValkyrieError, OSError, RuntimeError, ValueError, ImportError) as error:
            # a broken part is what a doctor is asked about: it is reported, not raised
            line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            result = Check(status="fail", what=what, detail=f"{type(error).__name__}: {line}")
        found.extend(result if isinstance(result, list) else [result])
    return found


def check_python() -> Check:
    """The interpreter's version."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < PYTHON_FLOOR:
        return Check(
            status="fail",
            what="python",
            detail=f"{version}; 3.11 or newer is needed",
            fix="make the virtual environment with a newer Python",
        )
    return Check(status="ok", what="python", detail=f"{version} ({sys.executable})")


def check_torch(version: str | None = None) -> Check:
    """torch's version; older ones have known holes in their loaders."""
    version = version or str(torch.__version__)
    parts = version.split("+")[0].split(".")
    numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts[:2])
    if numbers < TORCH_FLOOR:
        return Check(
            status="fail",
            what="torch",
            detail=f"{version}; 2.10 or newer is needed",
            fix="pip install --upgrade 'torch>=2.10,<2.14'",
        )
    return Check(status="ok", what="torch", detail=version)


def check_threads() -> Check:
    """How many threads torch computes with, beside the processors it may use."""
    threads, usable = torch.get_num_threads(), usable_cpus()
    detail = f"{threads} threads on {usable} usable processors ({hardware.cpu().model})"
    if threads > usable:
        return Check(
            status="warn", what="threads", detail=detail, fix=f"export OMP_NUM_THREADS={usable}"
        )
    return Check(status="ok", what="threads", detail=detail)


def usable_cpus() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_devices() -> Check:
    """Accelerators; a CPU alone is enough for the small recipes."""
    found = [f"{one['device']} ({one['model']})" for one in hardware.devices()]
    return Check(status="ok", what="devices", detail=", ".join(found))


def check_bf16(device: str) -> Check:
    """Whether training will use bf16 by itself."""
    if hardware.supports_bf16(device):
        return Check(status="ok", what="bf16", detail=f"{device} multiplies bf16 in hardware")
    return Check(
        status="warn",
        what="bf16",
        detail=f"{device} has no bf16 instructions: training runs in fp32, about half as fast",
    )


def check_kernels(kernels: object) -> Check:
    """Which form of the RWKV-7 recurrence will run on the CPU, and why not the native one."""
    available = getattr(kernels, "available", None)
    if not callable(available):
        return Check(
            status="ok",
            what="kernels",
            detail="wkv7: the chunked form in plain torch; there is no native kernel",
        )
    form, reason = available()
    if reason is None:
        return Check(status="ok", what="kernels", detail=f"wkv7: {form}")
    return Check(
        status="warn",
        what="kernels",
        detail=f"wkv7: the {form} form in plain torch, several times slower than native: {reason}",
    )


def check_peaks(cache_dir: Path, *, device: str, refresh: bool) -> list[Check]:
    """The measured matmul rates, which MFU is relative to."""
    checks = []
    for precision in hardware.DTYPES:
        if precision == "bf16" and not hardware.supports_bf16(device):
            continue
        peak = hardware.matmul_peak(precision, cache_dir=cache_dir, device=device, refresh=refresh)
        detail = (
            f"{peak.flops_per_second / 1e9:,.0f} GFLOP/s in {precision} on {device} "
            f"(best at {peak.size} x {peak.size})"
        )
        checks.append(Check(status="ok", what="matmul peak", detail=detail))
    return checks


def check_disk(runs_dir: Path) -> Check:
    """Room for checkpoints, and the right to write them."""
    folder = _nearest_folder(runs_dir)
    free = shutil.disk_usage(folder).free
    detail = f"{free / 2**30:,.1f} GiB free for {runs_dir}"
    if not _can_write(folder):
        return Check(
            status="fail",
            what="disk",
            detail=f"{folder} can't be written to",
            fix="--set runs_dir=FOLDER",
        )
    if free < LEAST_FREE_BYTES:
        return Check(
            status="warn", what="disk", detail=detail, fix="make room, or --set runs_dir=FOLDER"
        )
    return Check(status="ok", what="disk", detail=detail)


def check_cache(cache_dir: Path) -> Check:
    """Whether packed data and measurements can be kept."""
    folder = _nearest_folder(cache_dir)
    if not _can_write(folder):
        return Check(
            status="fail",
            what="cache",
            detail=f"{folder} can't be written to",
            fix="export VALKYRIE_CACHE=FOLDER",
        )
    return Check(status="ok", what="cache", detail=str(cache_dir))


def _nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest parent that exists: folders are made when needed."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(b"valkyrie")
    except OSError:
        return False
    return True


def check_pip() -> Check:
    """Whether corpora of type `package` can be downloaded."""
    if importlib.util.find_spec("pip") is None:
        return Check(
            status="warn",
            what="pip",
            detail="not installed here: corpora of type `package` can't be downloaded",
            fix="python -m ensurepip --upgrade",
        )
    return Check(status="ok", what="pip", detail="present (downloads corpora of type `package`)")


def check_extras() -> list[Check]:
    """One line per extra: what is there, and what is missing for what."""
    checks = []
    for extra, versions in hardware.extras().items():
        there = [f"{module} {version}" for module, version in versions.items() if version]
        missing = [
            f"{module} (for {hardware.EXTRAS[extra][module]})"
            for module, version in versions.items()
            if not version
        ]
        parts = [*there, *([f"not installed: {', '.join(missing)}"] if missing else [])]
        checks.append(
            Check(
                # an extra is what one chose not to have: its absence is no warning
                status="ok",
                what=f"extra {extra}",
                detail="; ".join(parts),
                fix=f"pip install 'valkyrie-lab[{extra}]'" if missing else None,
            )
        )
    return checks


def check_training(self_test: SelfTest) -> Check:
    """A tiny hybrid learns, and twice the same gives the same."""
    before, after = self_test()
    if not after < before:
        return Check(
            status="fail",
            what="self test",
            detail=f"a training step took the loss from {before:.4f} to {after:.4f}",
            fix="report this with the output of `valkyrie doctor --json`",
        )
    if self_test() != (before, after):
        return Check(
            status="warn",
            what="self test",
            detail="the same training step gave another loss: runs won't repeat bit for bit",
        )
    return Check(
        status="ok",
        what="self test",
        detail=f"one training step: loss {before:.4f} -> {after:.4f}, twice the same",
    )
