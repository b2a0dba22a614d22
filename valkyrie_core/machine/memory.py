"""How much memory this process held at most, since it was asked to watch."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
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
