"""The public functions, as a Python program uses them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import TINY, cache, runs_dir
from valkyrie_core import HybridLM, Recipe, runs
from valkyrie_core.errors import MissingError, UsageError

__all__ = ["cache", "runs_dir"]


def test_load_gives_a_model_that_runs(runs_dir: Path) -> None:
    model, tokenizer, recipe = runs.load("tiny-hybrid", runs_dir=runs_dir)
    assert isinstance(model, HybridLM)
    assert isinstance(recipe, Recipe)
    assert recipe.name == "tiny-hybrid"
    tokens_BT = torch.tensor([tokenizer.encode("hello")])
    output = model(tokens_BT, model.init_state(1))
    assert output.logits_BTV.shape == (1, 5, tokenizer.vocab_size)
    assert not model.training
    by_path = runs.load(runs_dir / "tiny-hybrid").model
    newest = runs.load(runs_dir=runs_dir).model
    for one, other, third in zip(
        model.parameters(), by_path.parameters(), newest.parameters(), strict=True
    ):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_load_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        runs.load("nothing", runs_dir=tmp_path)


def test_generate_tells_pieces_as_they_come(runs_dir: Path) -> None:
    pieces: list[str] = []
    report = runs.generate(
        "tiny-hybrid", prompt="a", max_tokens=9, on_text=pieces.append, runs_dir=runs_dir
    )
    assert "".join(pieces) == report.text
    assert len(pieces) > 1
    assert report.sampling.max_tokens == 9


def test_sampling_names_what_is_wrong() -> None:
    assert runs.sampling(top_k=3).top_k == 3
    assert runs.sampling() == runs.sampling(temperature=None)
    with pytest.raises(UsageError, match=r"top_p.*got 2"):
        runs.sampling(top_p=2.0)


def test_a_chat_keeps_its_turns(runs_dir: Path) -> None:
    opened = runs.open_chat("tiny-hybrid", max_tokens=4, runs_dir=runs_dir)
    assert not opened.knows_conversations
    "".join(opened.session.send("hello"))
    assert len(opened.session.turns) == 1
    report = runs.chat_report(opened, [])
    assert (report.answer, report.tokens, report.turns) == ("", 0, [])


def test_training_needs_a_fresh_name(runs_dir: Path) -> None:
    recipe = Recipe.load(TINY, [f"runs_dir={runs_dir}"])
    with pytest.raises(UsageError, match="exists already"):
        runs.train(recipe)


def test_long_work_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    from valkyrie_core.runs.training import tell_now_and_then

    times = iter([0.0, 1.0, 5.0, 5.0, 6.0, 10.0, 10.0])
    tell = tell_now_and_then(5.0, lambda: next(times))
    with caplog.at_level(logging.INFO, logger="valkyrie"):
        for done in range(1, 5):
            tell("packing", done, 9)
    assert [record.message for record in caplog.records] == ["packing: 2 of 9", "packing: 4 of 9"]


def test_listing_runs_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from valkyrie_core import runs; "
        f"runs.list_runs({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert result.returncode == 0


def test_every_public_name_is_there() -> None:
    assert [name for name in runs.__all__ if not hasattr(runs, name)] == []
