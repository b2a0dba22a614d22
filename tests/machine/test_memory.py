"""How much memory there is: what the system says, and what control groups leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from valkyrie_core.machine import memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free, in no group."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * GIB >> 10} kB\n")
    (tmp_path / "cgroup").write_text("")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    return tmp_path


def group(folder: Path, limit: str, used: int, cached: int, *, version: int) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


def test_what_the_system_has(machine: Path) -> None:
    assert memory.available_memory() == 8 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_leaves_less(machine: Path, version: int) -> None:
    line = "4:memory:/job/inner" if version == 1 else "0::/job/inner"
    (machine / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    root = machine / "groups" / ("memory" if version == 1 else "")
    # the outer one binds; the inner one has no limit that matters
    group(root / "job", str(4 * GIB), 2 * GIB, GIB, version=version)
    group(root / "job" / "inner", "max" if version == 2 else str(2**62), 0, 0, version=version)
    assert memory.available_memory() == 3 * GIB
    group(root / "job", str(4 * GIB), 6 * GIB, 0, version=version)
    assert memory.available_memory() == 0


def test_where_nobody_tells(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert memory.available_memory() is None


def test_this_machine_has_some() -> None:
    available = memory.available_memory()
    assert available is None or available > 1 << 20
