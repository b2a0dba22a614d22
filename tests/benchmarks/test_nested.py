"""The study of nested expressions: its arms load, and its table is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import nested
from valkyrie_core.data.readers.questions import QuestionsCorpus


@pytest.mark.parametrize("arm", nested.ARMS)
def test_arms_change_memory_and_loops_alone(arm: str, tmp_path: Path) -> None:
    whole, own = (nested.STUDY.recipe_of(name, 2, tmp_path) for name in ("memory_0", arm))
    core: Any = own.model.core
    assert core.memory_tokens == own.data.memory_tokens == nested.ARMS[arm].memory_tokens
    changed = {"memory_tokens": 0, "loops": 4}
    same = own.model.model_copy(update={"core": core.model_copy(update=changed)})
    assert same == whole.model
    assert (own.seed, own.train) == (2, whole.train)


def test_questions_of_all_depths_keep_those_of_training_apart(tmp_path: Path) -> None:
    recipe = nested.STUDY.recipe_of("memory_0", 0, tmp_path)
    trained = recipe.data.corpora[nested.CORPUS]
    asked = nested.deeper(recipe).data.corpora[nested.CORPUS]
    assert isinstance(trained, QuestionsCorpus)
    assert isinstance(asked, QuestionsCorpus)
    assert asked.task.difficulties == nested.DEPTHS
    few = trained.model_copy(update={"examples": 2000})
    seen = {one.canonical for one in few.training()}
    assert not seen & {one.canonical for one in asked.held_out()}


def result(arm: str, seed: int, reached: int) -> dict[str, Any]:
    shares = {str(depth): 0.95 if depth <= reached else 0.4 for depth in nested.DEPTHS}
    loops = ("4", "8") if nested.ARMS[arm].carries else ("1",)
    origin = {"processor": "P", "date": "D"}
    return {"arm": arm, "seed": seed, "by_loops": dict.fromkeys(loops, shares), "origin": origin}


def test_the_deepest_level_is_the_last_before_one_is_missed() -> None:
    assert nested.deepest(result("memory_0", 0, 3)["by_loops"]["4"]) == 3
    gap = {str(depth): 0.5 if depth == 2 else 1.0 for depth in nested.DEPTHS}
    assert nested.deepest(gap) == 1
    assert nested.deepest(dict.fromkeys(map(str, nested.DEPTHS), 0.89)) == 0


def test_the_table_has_a_row_for_every_number_of_loops() -> None:
    found = [result("memory_0", seed, 3 + seed) for seed in range(2)] + [result("alone_8", 0, 1)]
    table = nested.table(found)
    assert "| 0 | yes | 4 | 95% | 95% | 95% | 68% | 40% | 40% | 40% | 3, 4 |" in table
    assert "| 8 | no | 1 | 95% | 40% | 40% | 40% | 40% | 40% | 40% | 1 |" in table
    assert "Partial" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
