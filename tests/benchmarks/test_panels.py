"""The picture of experts beside recursion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import panels


def summary(unit: str, name: str) -> dict[str, Any]:
    designs = [
        {"name": one, "parameters": 400_000, "primary": [0.5, 0.7, 0.6]} for one in ("moe", name)
    ]
    metric = {"unit": unit, "lower_is_better": unit == "bits per byte"}
    return {"metrics": [metric], "contenders": designs, "match": "flops"}


def test_a_panel_is_drawn_for_every_comparison() -> None:
    kinds = ("right answers", "right answers", "bits per byte")
    found = [
        (panel, summary(kind, panel.recursive))
        for panel, kind in zip(panels.PANELS, kinds, strict=True)
    ]
    alone, all_of_them = panels.draw(found[:1]), panels.draw(found)
    assert all_of_them.startswith(b"\x89PNG")
    assert len(all_of_them) > len(alone)


def test_without_a_comparison_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(panels, "FOLDER", tmp_path)
    assert panels.main() == 1
    assert "docs/reasoning.md" in capsys.readouterr().err
