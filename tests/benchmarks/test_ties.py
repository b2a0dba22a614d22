"""The study of ties: a short one runs and says how many were wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables, ties


def test_the_page_has_a_place() -> None:
    assert "x" in tables.put(ties.PAGE.read_text(encoding="utf-8"), ties.NAME, "x")


@pytest.mark.slow
def test_two_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin ties -->\n<!-- end ties -->\n")
    monkeypatch.setattr(ties, "PAGE", page)
    monkeypatch.setattr(ties, "FILE", tmp_path / "ties.json")
    args = ["--pairs", "2", "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert ties.main(args) == 0
    found = json.loads((tmp_path / "ties.json").read_text())["pairs"]
    # seeds of their own: no pair is another one's
    assert found[0]["value"] != found[1]["value"]
    assert "2 comparisons of 3 seeds a side" in page.read_text()
    assert len(list((tmp_path / "runs" / "compare").iterdir())) == 12
