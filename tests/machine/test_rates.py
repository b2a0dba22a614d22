"""Measured once, then read."""

from __future__ import annotations

from pathlib import Path

import pytest

from valkyrie_core.machine import rates
from valkyrie_core.machine.measured import measured


def test_rates_are_plausible_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "COPIED_BYTES", 1 << 20)
    bandwidth = rates.memory_bandwidth(cache_dir=tmp_path)
    seconds = rates.operation_seconds(cache_dir=tmp_path)
    assert 1e7 < bandwidth < 1e14
    assert 1e-8 < seconds < 1e-2
    monkeypatch.setattr(rates, "run_apart", lambda *_: pytest.fail("measured twice"))
    assert rates.memory_bandwidth(cache_dir=tmp_path) == bandwidth
    assert rates.operation_seconds(cache_dir=tmp_path) == seconds


def test_an_entry_with_other_names_is_measured_again(tmp_path: Path) -> None:
    measured("key", ("old",), lambda: {"old": 1.0}, cache_dir=tmp_path)
    measured("other", ("x",), lambda: {"x": 2.0}, cache_dir=tmp_path)
    assert measured("key", ("new",), lambda: {"new": 3.0}, cache_dir=tmp_path) == {"new": 3.0}
    # and the others stay
    assert measured("other", ("x",), lambda: {"x": 9.0}, cache_dir=tmp_path) == {"x": 2.0}
