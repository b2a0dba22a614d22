"""A study: what it lacks is trained, one process each, and its page is written of what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import collapse, jobs, moe, nested, result, sudoku, tracking
from benchmarks.jobs import Found, Study, run_study
from valkyrie_core.errors import ValkyrieError

STUDIES = (collapse.STUDY, moe.STUDY, nested.STUDY, sudoku.STUDY, tracking.STUDY)


def study(results: Path) -> Study:
    """Of two arms, whose trainings end at once."""
    return Study(
        name="study",
        about="A study.",
        recipe="tiny/hybrid",
        arms=("a", "b"),
        overrides=lambda arm: [f"train.steps={3 if arm == 'a' else 4}"],
        train=lambda arm, recipe: {"steps": recipe.train.steps},
        page="page.md",
        tables=_table,
        seeds=(0, 1),
        results=results,
    )


def _table(found: Sequence[Found]) -> dict[str, str]:
    return {"steps": ", ".join(f"{one['arm']}{one['seed']} {one['steps']}" for one in found)}


@pytest.mark.parametrize("one", STUDIES, ids=lambda one: one.name)
def test_every_study_has_a_page_with_places_for_its_tables(one: Study) -> None:
    text = (result.ROOT / "docs" / one.page).read_text(encoding="utf-8")
    for name in (one.name, *(("halting", "trap") if one is sudoku.STUDY else ())):
        assert f"<!-- begin {name} -->" in text
        assert f"<!-- end {name} -->" in text
    assert (result.ROOT / "benchmarks" / f"{one.name}.py").exists()


def test_a_stopped_study_trains_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("before <!-- begin steps --> old <!-- end steps --> after")
    monkeypatch.setattr(result, "ROOT", tmp_path)
    own = study(tmp_path / "results")
    with pytest.raises(ValkyrieError, match="no result yet"):
        own.write_page()
    asked: list[tuple[str, int]] = []

    def here(module: str, left: Sequence[tuple[str, int]], *, runs_dir: Path, **_: int) -> None:
        assert module == "benchmarks.study"
        asked.extend(left)
        for arm, seed in left:
            own.run_one(arm, seed, runs_dir)

    monkeypatch.setattr(jobs, "run_jobs", here)
    assert run_study(own, ["--runs-dir", str(tmp_path), "--one", "b", "0"]) == 0
    assert run_study(own, ["--runs-dir", str(tmp_path)]) == 0
    assert asked == [("a", 0), ("a", 1), ("b", 1)]
    text = page.read_text()
    assert "a0 3, a1 3, b0 4, b1 4" in text
    assert text.startswith("before")
    assert text.endswith("after")
