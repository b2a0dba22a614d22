"""How much memory this process held at most, and how much this machine still has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_CLEAR = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"
"""What Linux takes to mean: the peak starts again from what is held now (proc(5))."""


def reset_peak_memory() -> bool:
    """Starts the watch; False where the system has none, and a peak may be from before."""
    try:
        _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory() -> int | None:
    """Bytes of main memory that the process held at most; None where the system does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return None


def available_memory() -> int | None:
    """Bytes of main memory that this process could still take; None where nobody tells.

    The least of what the system has free or can free, and of what each control group that the
    process is in (a container, a batch job) leaves of its limit.
    """
    known = [room for room in (_system_room(), *_group_rooms()) if room is not None]
    return min(known, default=None)


def _system_room() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _group_rooms() -> Iterator[int | None]:
    """What is left in the group of each level, in version 2 and in version 1 of control groups."""
    try:
        lines = _GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        inside = Path(path.lstrip("/"))
        for level in (inside, *inside.parents):
            yield _room(root / level, *names)


def _room(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        used = int((folder / usage).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if not most.isdecimal():
        # "max": no limit here
        return None
    # pages of files that were read count as used, and go as soon as somebody needs the room
    files = dict(line.split() for line in stat.splitlines() if line.count(" ") == 1)
    return max(0, int(most) - used + int(files.get(cached, 0)))
