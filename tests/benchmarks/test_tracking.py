"""The study of state tracking: its arms load, and its table and picture are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tracking
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.data.tasks.group import GroupConfig


@pytest.mark.parametrize("arm", tracking.ARMS)
def test_arms_are_what_they_say(arm: str, tmp_path: Path) -> None:
    recipe, own = tracking.STUDY.recipe_of(arm, 1, tmp_path), tracking.ARMS[arm]
    corpus = recipe.data.corpora["words"]
    assert isinstance(corpus, QuestionsCorpus)
    trained, asked = corpus.task, corpus.validation_task
    assert isinstance(trained, GroupConfig)
    assert isinstance(asked, GroupConfig)
    assert trained.group == asked.group == own.group
    assert trained.elements == asked.elements
    assert (trained.lengths, asked.lengths) == ((tracking.TRAINED,), tracking.LENGTHS)
    core: Any = recipe.model.core
    assert core.loops == own.loops
    mixer = core.blocks["layer"].mixer
    assert mixer.type == ("attention" if own.mixer == "attention" else "rwkv7")
    if mixer.type == "rwkv7":
        assert mixer.eigenvalues == own.mixer


def result(arm: str, seed: int, shares: tuple[float, float, float]) -> dict[str, Any]:
    by_length = {str(n): share for n, share in zip(tracking.LENGTHS, shares, strict=True)}
    origin = {"processor": "P", "date": "D"}
    return {
        "arm": arm,
        "seed": seed,
        "parameters": 1000,
        "by_length": by_length,
        "origin": origin,
    }


def test_the_table_tells_the_mean_and_the_worst() -> None:
    found = [
        result("parity_signed_1", 0, (1.0, 1.0, 0.8)),
        result("parity_signed_1", 1, (1.0, 0.9, 0.5)),
        result("a5_attention_2", 0, (0.5, 0.02, 0.01)),
    ]
    table = tracking.table(found)
    assert "| RWKV-7, signed | 1 | 100% (100%) | 95% (90%) | 65% (50%) | - |" in table
    assert "| attention | 2 | - | - | - | - | - | - | 50% (50%) | 2% (2%) | 1% (1%) |" in table
    assert "parity 50%, S3 17%, A5 2%" in table
    assert "Partial" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert tracking.draw(found).startswith(b"\x89PNG")
