"""Who else is busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import quiet


@pytest.mark.skipif(not quiet.STAT.exists(), reason="only Linux tells")
def test_our_own_work_is_counted_and_a_busy_neighbour_is_seen() -> None:
    own = quiet.own_seconds()
    deadline = time.process_time() + 0.3
    while time.process_time() < deadline:
        pass
    assert quiet.own_seconds() - own > 0.2
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = quiet.Watch()
        time.sleep(1)
        beside = watch.others_share()
    finally:
        neighbour.kill()
        neighbour.wait()
    assert beside is not None
    # of one core, whatever part of it other neighbours leave
    assert beside * (os.cpu_count() or 1) > 0.2


def test_where_the_system_tells_nothing_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quiet, "STAT", tmp_path / "stat")
    assert quiet.Watch().others_share() is None
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0, 0))
    sentence = quiet.disturbance(0.0)
    assert sentence is not None
    assert "stall" in sentence
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0, 0))
    assert quiet.disturbance(0.0) is None
