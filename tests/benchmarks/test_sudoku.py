"""The study of the canvas: its arms load, and its tables are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import sudoku


@pytest.mark.parametrize("arm", sudoku.ARMS)
def test_arms_change_one_thing(arm: str, tmp_path: Path) -> None:
    whole, own = (sudoku.STUDY.recipe_of(name, 2, tmp_path) for name in ("canvas", arm))
    assert own.seed == 2
    same = whole.model_copy(update={"name": own.name})
    assert (own == same) == (arm == "canvas")


def result(arm: str, seed: int, share: float) -> dict[str, Any]:
    halting = {
        "score": share - 0.01,
        "full_score": share,
        "reasoning_steps": 4.0,
        "seconds": 1.0,
        "full_seconds": 2.0,
    }
    return {
        "arm": arm,
        "seed": seed,
        "share": share,
        "by_difficulty": {"12": share, "24": share},
        "seconds": 100.0,
        "reasoning_steps": {"10": 8.0, "20": None, "30": 5.0},
        "thinking": {"full_depth": 8, "calibration_error": 0.02, "brier": 0.01},
        "rules": dict.fromkeys(sudoku.RULES, halting),
        "calibrated": {"test": {**halting, "risk": 0.015}},
        "origin": {"processor": "P", "date": "D"},
    }


def test_tables_tell_means_and_what_is_saved() -> None:
    found = [result("canvas", seed, 0.9 + seed / 100) for seed in range(3)]
    parts = sudoku.parts_table([*found, result("alone", 0, 0.2)])
    assert "| as it is | 91.0% ± 2.5% | 91.0% | 91.0% | 5.0 | 3 |" in parts
    assert "| no deep supervision: one step | 20.0% |" in parts
    assert "Partial" in parts
    halting = sudoku.halting_table(found)
    assert "| `kl=0.001` | 90.0% ± 2.5% | 1.0 | 4.00 | 50% | 50% |" in halting
    assert "calibrated, risk 2%" in halting
    assert "1.50%, 1.50%, 1.50%" in halting


def test_the_trap_is_told_by_when_questions_ended() -> None:
    trap = sudoku.trap_table([result("bias_0", 0, 0.5), result("one_step", 0, 0.5)])
    assert "| halting bias 0 | 8.0 | 5.0 | 50.0% | 49.0% | 4.00 | 1 |" in trap
    assert "last turn" not in trap


def test_heads_and_rows_have_as_many_cells() -> None:
    for table in (
        sudoku.parts_table([result("canvas", 0, 0.5)]),
        sudoku.halting_table([result("canvas", 0, 0.5)]),
        sudoku.trap_table([result("canvas", 0, 0.5)]),
    ):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1
