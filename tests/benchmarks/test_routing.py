"""The study of routers: its arms load, what is read is right, and so is its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import routing
from valkyrie_core.nn.model import HybridLM


@pytest.mark.parametrize("arm", routing.ARMS)
def test_arms_are_what_they_say(arm: str, tmp_path: Path) -> None:
    recipe, own = routing.STUDY.recipe_of(arm, 1, tmp_path), routing.ARMS[arm]
    core: Any = recipe.model.core
    mixers = [core.blocks[name].mixer for name in core.layers]
    assert len(mixers) == 3
    for mixer in mixers:
        assert (mixer.type == "routed") == (own.budget is not None)
        if own.budget is not None:
            assert mixer.budget.flops == own.budget
            assert ("lot" in arm) == (mixer.gate == "lot")
            assert "skip" in mixer.mixers
            assert (len(mixer.mixers) == 2) == ("depths" in arm)
    assert set(recipe.data.corpora) == set(routing.TASKS)


def model_of(arm: str) -> HybridLM:
    torch.manual_seed(0)
    config = routing.STUDY.recipe_of(arm, 0, Path("x")).model
    return HybridLM(config.model_copy(update={"vocab_size": 30})).eval()


def test_operations_are_those_of_the_tokens_that_were_chosen() -> None:
    torch.manual_seed(1)
    texts = {task: (torch.randint(0, 30, (3, 50)), torch.zeros(3, 50).long()) for task in "ab"}
    found = routing.read(model_of("lot_50"), texts)
    # a document's first token goes through all
    assert found["operations"] == pytest.approx(0.5 + 0.02, abs=0.06)
    # lots look at no token: both texts have the same positions
    assert found["information"] == pytest.approx([0, 0, 0], abs=1e-9)
    found = routing.read(model_of("attention"), texts)
    assert found["information"] is None
    assert 0.6 < found["operations"] < 0.9
    assert routing.read(model_of("rwkv"), texts)["operations"] == pytest.approx(1)


def test_seconds_are_those_beside_another() -> None:
    texts = {"a": (torch.randint(0, 30, (4, 64)), torch.zeros(4, 64).long())}
    model = model_of("attention")
    assert 0.5 < routing.seconds_beside(model, model, texts) < 2


def result(arm: str, seed: int, shares: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    found = {"operations": 1.0, "information": None, "time": 1.25, **more}
    origin = {"processor": "P", "date": "D"}
    accuracy = dict(zip(routing.TASKS, shares, strict=True))
    return {"arm": arm, "seed": seed, "accuracy": accuracy, "origin": origin, **found}


def test_the_table_tells_what_is_there() -> None:
    routed = {"operations": 0.6, "information": [0.1, None, 0.3]}
    table = routing.table(
        [
            result("router_75", 0, (1.0, 0.8, 0.6), **routed),
            result("router_75", 1, (0.5, 0.8, 0.8), **routed),
            result("rwkv", 0, (1.0, 1.0, 0.1)),
        ]
    )
    row = "| router | 0.75 | 75.0% (50%) | 80.0% (80%) | 70.0% (60%) | 75.0% | 0.60 | 1.25 | 0.30 |"
    assert row in table
    assert "| static: RWKV-7 |  | 100.0% (100%) | 100.0% (100%) | 10.0% (10%) | 70.0% |" in table
    assert "Partial" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({one.count("|") for one in rows}) == 1
