"""The study of ratios: its queue, and the table that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ratio
from tests.allocate.small import PROXY, tiny
from valkyrie_core.allocate.proxy import Score
from valkyrie_core.errors import UsageError


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("# Before\n\n<!-- begin ratio -->\n<!-- end ratio -->\n\nafter\n")
    return path


def test_a_tiny_study(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALKYRIE_CACHE", str(tmp_path / "cache"))
    recipe, folder = tiny(tmp_path), tmp_path / "results"
    scores = ratio.study(recipe, PROXY, (0, 1), folder, processes=2, ratios=("0:2", "2:0"))
    assert len(scores) == 2 * 2 * 2
    # a second call trains nothing
    assert ratio.study(recipe, PROXY, (0, 1), folder, processes=2, ratios=("0:2", "2:0")) == scores
    ratio.write_page(page, folder)
    text = page.read_text()
    assert text.startswith("# Before")
    assert "after" in text
    assert "| 0 : 2 | AA | 2 |" in text
    assert "| 2 : 0 | RR | 2 |" in text
    assert "paired by seed" in text
    other = PROXY.model_copy(update={"language": PROXY.language.model_copy(update={"steps": 3})})
    with pytest.raises(UsageError, match="other settings"):
        ratio.study(recipe, other, (0,), folder, processes=1)


def test_nothing_is_no_table(tmp_path: Path, page: Path) -> None:
    with pytest.raises(UsageError, match="no result"):
        ratio.write_page(page, tmp_path)


def test_the_table_says_what_is_sure(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    scores = []
    for job in ratio.ratio_jobs(recipe, PROXY, (0, 1, 2), ("0:2", "1:1", "2:0")):
        recurrent = "A" not in job.layers
        if job.task == "language":
            score = Score(job=job, parameters=10, bpb=2.0 + 0.001 * (-1) ** job.seed, seconds=1.0)
        else:
            share = 0.2 + 0.01 * job.seed if recurrent else 1.0
            score = Score(job=job, parameters=10, recall={1: share, 3: share}, seconds=1.0)
        scores.append(score)
    study = {"origin": _origin(), "proxy": PROXY.model_dump(mode="json")}
    table = ratio.ratio_table(scores, study)
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["0 : 2", "1 : 1", "2 : 0"]
    assert "2.0003 ± 0.0029" in table
    assert "0.210 ± 0.025" in table
    recall = next(line for line in table.splitlines() if line.startswith("- recall against"))
    assert "0:2 +0.790 ± 0.025 (surely)" in recall


def _origin() -> dict[str, object]:
    return {
        "date": "2026-01-01",
        "commit": "0",
        "processor": "a processor",
        "flags": [],
        "threads": 1,
        "versions": {},
    }
