"""Whether the machine is quiet: what other processes take from its cores while we measure.

Two threads that meet at a barrier wait for the slower one. Beside a busy process one of them may
lose its core for a whole time slice of the scheduler, and every small operator takes 20 to 50 times
as long. Linux tells in /proc/stat how long its cores worked; what we did ourselves is taken off.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
NOISY = 0.05
"""From this share of the machine on, other processes disturb."""


class Watch:
    """Other processes' share of the cores since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy, self._own = busy_seconds(), own_seconds()

    def others_share(self) -> float | None:
        """Between 0 and 1; None where the system does not tell."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (own_seconds() - self._own)
        elapsed = max(time.perf_counter() - self._began, 1e-9) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, others / elapsed))


def busy_seconds() -> float | None:
    """How long all cores together have worked since the system started."""
    try:
        with STAT.open(encoding="ascii") as lines:
            fields = [int(x) for x in lines.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _wait, interrupt, soft, steal = fields
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """What this process and its finished children have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def disturbance(seconds: float = 0.5) -> str | None:
    """A sentence on who else is busy right now, or None; takes `seconds`."""
    watch = Watch()
    time.sleep(seconds)
    share = watch.others_share()
    if share is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        share = load / (os.cpu_count() or 1)
    if share < NOISY:
        return None
    return (
        f"other processes use {share:.0%} of the cores: times will be wrong, "
        "two threads beside a busy process stall 20 to 50 times"
    )
