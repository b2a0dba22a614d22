"""run(N) and run(k) + resume(N - k) give the same bits: weights, optimizer, generators, rows."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train import small
from valkyrie_core.errors import CheckpointError, StoppedError, UsageError
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.recipe import Recipe
from valkyrie_core.train import journal, session, stages
from valkyrie_core.train.checkpoint import list_checkpoints
from valkyrie_core.train.progress import StepEvent
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.schedule import Extension

OPTIMIZERS = {"adamw": {"type": "adamw", "lr": 0.01}, "muon": small.MUON}
SCHEDULES = {
    "cosine": {"type": "cosine", "warmup_steps": 2},
    "wsd": {"type": "wsd", "warmup_steps": 2, "decay_fraction": 0.5},
}
CASES: dict[str, dict[str, Any]] = {
    f"{optimizer}-{schedule}": {
        "optimizer": OPTIMIZERS[optimizer],
        "schedule": SCHEDULES[schedule],
    }
    for optimizer, schedule in itertools.product(OPTIMIZERS, SCHEDULES)
}
CASES["accumulation"] = {"optimizer": small.MUON, "grad_accum_steps": 4}
CASES["bf16"] = {"optimizer": small.MUON, "precision": "bf16"}
CASES["state passing"] = {
    "optimizer": small.MUON,
    "grad_accum_steps": 2,
    "state_passing": {"span": 64},
    "context_schedule": [{"from_fraction": 0.7, "context_len": 32}],
}
CASES["dropout"] = {"optimizer": small.MUON, "grad_accum_steps": 2}

Outcome = tuple[str, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "draw_curves", lambda rows, title: b"")


class Dropping(HybridLM):
    """A model that draws numbers while it trains, so that the generator's state matters."""

    calls = 0
    stop_at = 0

    def loss(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss, state, aux = super().loss(*arguments, **keywords)
        return nn.functional.dropout(loss, 0.3, self.training) + torch.rand(()) * loss, state, aux


def outcome(run: RunDir) -> Outcome:
    return small.digest(run), small.rows(run)


def send_at(step: int, *, number: int = signal.SIGTERM) -> Callable[[StepEvent], None]:
    """A progress callback that sends a signal to this process after a step."""

    def progress(event: StepEvent) -> None:
        if event.step == step and event.validation is None:
            os.kill(os.getpid(), number)

    return progress


def stopped_after(recipe: Recipe, step: int, cache: Path, **keywords: Any) -> None:
    with pytest.raises(StoppedError) as caught:
        small.train(recipe, cache=cache, progress=send_at(step), **keywords)
    assert caught.value.exit_code == 75
    assert caught.value.hint == "valkyrie train small --resume"
    newest = list_checkpoints(Path(recipe.runs_dir) / recipe.name / "checkpoints")[0]
    assert newest[0] == step


@pytest.mark.parametrize("case", CASES)
def test_stopping_after_every_step_changes_no_bit(
    case: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "dropout":
        monkeypatch.setattr(session, "build_model", Dropping)
    settings: dict[str, Any] = CASES[case] | {"steps": 7, "sample_prompts": ["So"]}
    whole = small.train(small.recipe(folder, runs="whole", **settings), cache=cache)
    expected = outcome(whole.run)
    for k in range(1, 7):
        recipe = small.recipe(folder, runs=f"stopped{k}", **settings)
        stopped_after(recipe, k, cache)
        resumed = small.train(recipe, cache=cache, resume=True)
        assert resumed.finished
        assert outcome(resumed.run) == expected, f"stopped after step {k}"


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_a_stop_inside_a_step_gives_back_the_numbers_it_drew(
    stop_at: int, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "build_model", Dropping)
    settings: dict[str, Any] = {"steps": 3, "grad_accum_steps": 4}
    whole = small.train(small.recipe(folder, runs="whole", **settings), cache=cache)
    recipe = small.recipe(folder, runs="stopped", **settings)
    monkeypatch.setattr(Dropping, "stop_at", stop_at)
    with pytest.raises(StoppedError):
        small.train(recipe, cache=cache)
    monkeypatch.setattr(Dropping, "stop_at", 0)
    assert outcome(small.train(recipe, cache=cache, resume=True).run) == outcome(whole.run)


def test_a_stop_after_every_single_step(folder: Path, cache: Path) -> None:
    settings: dict[str, Any] = {"steps": 7, "optimizer": small.MUON, "grad_accum_steps": 2}
    whole = small.train(small.recipe(folder, runs="whole", **settings), cache=cache)
    recipe = small.recipe(folder, runs="stopped", **settings)
    for k in range(1, 7):
        stopped_after(recipe, k, cache, resume=k > 1)
    assert outcome(small.train(recipe, cache=cache, resume=True).run) == outcome(whole.run)


@pytest.mark.parametrize("pattern", [["rwkv", "rwkv"], ["attn"], ["attn", "rwkv"]])
@pytest.mark.parametrize("head", ["linear", "tied"])
def test_every_architecture_resumes(
    pattern: list[str], head: str, folder: Path, cache: Path
) -> None:
    blocks = {name: small.BLOCKS[name] for name in pattern}
    model = {"head": head, "core": {"type": "stack", "blocks": blocks, "pattern": pattern}}
    settings: dict[str, Any] = {"model": model, "optimizer": small.MUON, "steps": 4}
    whole = small.train(small.recipe(folder, runs="whole", **settings), cache=cache)
    recipe = small.recipe(folder, runs="stopped", **settings)
    stopped_after(recipe, 2, cache)
    assert outcome(small.train(recipe, cache=cache, resume=True).run) == outcome(whole.run)


def test_a_compiled_run_resumes(
    folder: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compiled = {"optimizer": small.MUON, "compile": {}}
    straight = small.train(small.recipe(folder, runs="straight", **compiled), cache=cache)
    recipe = small.recipe(folder, runs="stopped", **compiled)
    stopped_after(recipe, 3, cache)
    assert outcome(small.train(recipe, cache=cache, resume=True).run) == outcome(straight.run)
    assert "Graph break" not in capfd.readouterr().err


def test_equal_seeds_give_equal_bits_and_others_do_not(folder: Path, cache: Path) -> None:
    runs = [
        small.train(small.recipe(folder, runs=name, steps=3), cache=cache).run
        for name in ("one", "two")
    ]
    assert outcome(runs[0]) == outcome(runs[1])
    other = small.recipe(folder, runs="three", steps=3).model_copy(update={"seed": 2})
    assert outcome(small.train(other, cache=cache).run) != outcome(runs[0])


def test_validation_and_samples_do_not_disturb_training(folder: Path, cache: Path) -> None:
    """small.evaluate draws from the global generator; the weights must not show how often."""
    rare = small.recipe(folder, runs="rare", steps=6, eval_every=6)
    often = small.recipe(folder, runs="often", steps=6, eval_every=1, sample_prompts=["So"])
    weights = [small.weights(small.train(recipe, cache=cache).run) for recipe in (rare, often)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --steps and --extend-steps ----------------------------------------------------------------------


def test_steps_are_the_horizon_of_a_fresh_run(folder: Path, cache: Path) -> None:
    said = small.train(small.recipe(folder, runs="said", steps=4), cache=cache)
    typed = small.train(
        small.recipe(folder, runs="typed", steps=50, eval_every=3), cache=cache, steps=4
    )
    assert typed.horizon == 4
    assert typed.finished
    assert typed.run.load_recipe().train.steps == 4
    assert outcome(typed.run) == outcome(said.run)


def test_steps_stop_a_resumed_run_earlier_without_changing_a_bit(folder: Path, cache: Path) -> None:
    whole = small.train(small.recipe(folder, runs="whole", steps=7), cache=cache)
    recipe = small.recipe(folder, runs="parts", steps=7)
    stopped_after(recipe, 1, cache)
    part = small.train(recipe, cache=cache, resume=True, steps=5)
    assert (part.step, part.horizon, part.finished) == (5, 7, False)
    assert part.validation is not None  # that of step 3: none was added for the early end
    assert [row["step"] for row in small.rows(part.run) if row["kind"] == "val"] == [3]
    assert outcome(small.train(recipe, cache=cache, resume=True).run) == outcome(whole.run)


def test_steps_of_a_resumed_run_lie_between_here_and_the_horizon(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder, steps=6)
    stopped_after(recipe, 3, cache)
    with pytest.raises(UsageError, match="beyond the run's horizon of 6") as caught:
        small.train(recipe, cache=cache, resume=True, steps=7)
    assert "--extend-steps 1" in str(caught.value.hint)
    with pytest.raises(UsageError, match="at step 3"):
        small.train(recipe, cache=cache, resume=True, steps=2)


def test_the_horizon_stays_that_of_the_start(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_after(small.recipe(folder, steps=5), 2, cache)
    resumed = small.train(small.recipe(folder, steps=9), cache=cache, resume=True)
    assert resumed.horizon == 5
    assert "was started with 5 steps" in caplog.text


def test_resuming_a_finished_run_changes_nothing(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small.recipe(folder, steps=3)
    first = small.train(recipe, cache=cache)
    before = outcome(first.run)
    again = small.train(recipe, cache=cache, resume=True)
    assert outcome(again.run) == before
    assert again.finished
    assert again.train_loss == first.train_loss
    assert again.validation == first.validation
    assert "--extend-steps N continues it" in caplog.text


def test_an_extended_run_goes_on_and_resumes_exactly(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def finished(runs: str) -> Recipe:
        recipe = small.recipe(folder, runs=runs, steps=4, optimizer=small.MUON)
        small.train(recipe, cache=cache)
        return recipe

    whole = small.train(finished("whole"), cache=cache, extend_steps=5)
    assert (whole.step, whole.horizon, whole.finished) == (9, 9, True)
    assert "steps 4 to 9: the cosine schedule runs again" in caplog.text
    expected = outcome(whole.run)
    # nothing before the extension was written anew
    assert [row["step"] for row in expected[1] if row["kind"] == "train"] == [2, 4, 6, 8, 9]
    scales = {row["step"]: row["lr_scale"] for row in expected[1] if row["kind"] == "train"}
    assert scales[4] < 0.6 < scales[6]
    for k in (4, 5, 7):
        recipe = finished(f"stopped{k}")
        if k == 4:
            interrupted_before_its_first_step(recipe, cache)
        else:
            stopped_after(recipe, k, cache, extend_steps=5)
        assert outcome(small.train(recipe, cache=cache, resume=True).run) == expected
    twice = small.train(small.recipe(folder, runs="whole", steps=4, optimizer=small.MUON),
                        cache=cache, extend_steps=2)  # fmt: skip
    assert twice.horizon == 11
    assert twice.run.load_extensions() == (Extension(4, 5), Extension(9, 2))


def interrupted_before_its_first_step(recipe: Recipe, cache: Path) -> None:
    """The extension is known although nothing has been trained in it."""

    def batch(*_arguments: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.BatchStream, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            small.train(recipe, cache=cache, extend_steps=5)


def test_only_a_finished_run_is_extended(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder, steps=5)
    stopped_after(recipe, 2, cache)
    with pytest.raises(UsageError, match="not finished: it is at step 2 of 5") as caught:
        small.train(recipe, cache=cache, extend_steps=3)
    assert "--resume" in str(caught.value.hint)
    assert small.train(recipe, cache=cache, resume=True).horizon == 5


@pytest.mark.parametrize("content", [None, "broken", "[{}]", "7"])
def test_a_lost_list_of_extensions_comes_back_from_the_checkpoint(
    content: str | None, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small.recipe(folder, steps=3)
    small.train(recipe, cache=cache)
    stopped_after(recipe, 5, cache, extend_steps=4)
    run = RunDir(Path(recipe.runs_dir) / recipe.name)
    if content is None:
        run.extensions_file.unlink()
    else:
        run.extensions_file.write_text(content)
    assert small.train(recipe, cache=cache, resume=True).step == 7
    assert run.load_extensions() == (Extension(3, 4),)
    assert "incomplete and is restored" in caplog.text


def test_a_run_of_an_older_version_goes_on(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recipe.json lacks the keys that came later; its checkpoints are its own all the same."""

    def save_without_new_keys(self: RunDir, recipe: Recipe) -> None:
        stored = recipe.model_dump(mode="json")
        for key in ("context_schedule", "state_passing", "activation_checkpointing"):
            del stored["train"][key]
        self.storage.replace_json(self.recipe_file, stored)

    recipe = small.recipe(folder, steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save_recipe", save_without_new_keys)
        stopped_after(recipe, 2, cache)
    assert small.train(recipe, cache=cache, resume=True).finished
    assert small.train(recipe, cache=cache, extend_steps=2).step == 6
    changed = small.recipe(folder, steps=4, state_passing={"span": 32})
    with pytest.raises(UsageError, match=r"train\.state_passing"):
        small.train(changed, cache=cache, resume=True)


def test_an_extension_that_is_refused_leaves_nothing(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder, steps=2)
    run = small.train(recipe, cache=cache).run
    for text in (folder / "texts").glob("0*.txt"):
        text.write_text(text.read_text() + " and more")
    with pytest.raises(CheckpointError, match="the texts are not those"):
        small.train(recipe, cache=cache, extend_steps=3)
    assert run.load_extensions() == ()
