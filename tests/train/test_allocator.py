"""Freed memory stays with a process that trains."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from valkyrie_core.train import allocator

FAULTS = """
import resource, sys
import torch
from valkyrie_core.train.allocator import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
for _ in range(30):
    torch.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 23)
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def faults(mode: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes the advice")
def test_freed_tensors_are_used_again_without_page_faults() -> None:
    # ten tensors of 32 MiB: 8192 pages each
    assert faults("keep") < 0.1 * faults("leave")


HOLES = """
import resource, sys
import torch
from valkyrie_core.train.allocator import return_memory
def resident_memory():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
if sys.argv[1] == "return":
    assert return_memory()
before, kept = resident_memory(), []
for _ in range(20):
    wide = [torch.ones(1 << 22) for _ in range(4)]
    kept += [x.to(torch.bfloat16) for x in wide]
    del wide
sys.stdout.write(str(resident_memory() - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes the advice")
def test_narrow_copies_leave_no_holes_where_memory_is_returned() -> None:
    run = subprocess.run(
        [sys.executable, "-c", HOLES, "return"], capture_output=True, text=True, check=True
    )
    # 80 matrices of 8 MiB stay
    assert int(run.stdout) < 1.1 * 80 * (8 << 20)


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_memory()


def test_a_c_library_without_the_settings_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    assert not allocator.keep_memory()
