"""Training a canvas: the carry is kept from step to step, and nothing is lost on resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import small
from valkyrie_core.data.dataset import Dataset, prepare
from valkyrie_core.data.questions import Question, QuestionStream
from valkyrie_core.errors import CheckpointError, RecipeError
from valkyrie_core.evaluate.bits import bits_per_byte
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.canvas_core import Carry
from valkyrie_core.nn.models import build_model
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.average import Average
from valkyrie_core.train.deep_supervision import DeepSupervision
from valkyrie_core.train.objective import Running
from valkyrie_core.train.optim import build_optimizers
from valkyrie_core.train.progress import Validation
from valkyrie_core.train.routing import Routing
from valkyrie_core.train.session import TrainResult

CORE = {
    "type": "canvas",
    "blocks": {"attn": small.BLOCKS["attn"]},
    "pattern": ["attn"],
    "cells": 20,
    "h_cycles": 2,
    "l_cycles": 1,
    "halt_max_steps": 3,
    "memory_tokens": 2,
}
KHOP = {
    "type": "questions",
    "task": {"type": "khop", "symbols": 4, "hops": [1, 2]},
    "examples": 60,
    "validation_examples": 10,
    "holdout": {"type": "questions", "fraction": 0.5},
}


def recipe(folder: Path, core: dict[str, Any] | None = None, **train: Any) -> Recipe:
    tree = {
        "name": "canvas",
        "runs_dir": str(folder / "runs"),
        "data": {"corpora": {"khop": KHOP}, "tokenizer": {"type": "bytes"}},
        "model": {"dim": 16, "core": {**CORE, **(core or {})}},
        "train": {
            "type": "supervised",
            "steps": 8,
            "batch_size": 4,
            "optimizer": {"type": "adamw", "lr": 1e-3},
            "precision": "fp32",
            "eval_every": 4,
            "log_every": 2,
            **train,
        },
    }
    return Recipe.model_validate(tree)


def evaluate(model: Any, dataset: Dataset, poll: Any) -> Validation:
    torch.rand(3)  # training must not notice
    found = bits_per_byte(model, dataset.corpora["khop"].validation, context_len=8)
    return Validation(found.bpb, {"khop": found.bpb})


def train(settings: Recipe, cache: Path, **keywords: Any) -> TrainResult:
    return small.train(settings, cache=cache, evaluate=evaluate, **keywords)


class Bench:
    """An objective on its own."""

    def __init__(self, folder: Path, cache: Path, **changes: Any) -> None:
        self.recipe = recipe(folder, **changes)
        torch.manual_seed(0)
        model = build_model(self.recipe.model)
        assert isinstance(model, Canvas)
        self.model = model
        dataset = prepare(self.recipe.data, cache=cache)
        self.stream = QuestionStream(dataset, weights=dataset.weights, seed=0, cells=model.cells)
        self.asked: list[int] = []
        optimizers = build_optimizers(self.recipe.train.optimizer, model)
        self.objective = DeepSupervision(
            self.recipe.train,
            model,
            self._question,
            Routing(model, optimizers),
            Running("fp32", torch.device("cpu"), lambda: None, ValueError),  # type: ignore[arg-type]
        )

    def _question(self, number: int) -> Question:
        self.asked.append(number)
        return self.stream.row(number)

    def step(self) -> None:
        self.objective.gradients(0)
        self.objective.settle(0)


def halting_head(model: Canvas, bias: float) -> None:
    with torch.no_grad():
        model.q_head.bias.fill_(bias)


def test_questions_stay_until_their_last_step(folder: Path, cache: Path) -> None:
    bench = Bench(folder, cache)
    for _ in range(7):
        bench.step()
    # four rows, three steps of thought each
    assert bench.asked == list(range(12))
    thought = bench.objective.thought
    row = bench.objective.metrics()["recursion"]
    assert thought == (row["accuracy"], 3)
    assert bench.objective.thought is None
    assert row["reasoning_steps"] == 3
    assert row["halt_rate"] == 0
    assert row["q_halt_mean"] == pytest.approx(torch.tensor(-5.0).sigmoid().item())
    assert row["q_continue_mean"] is None
    assert set(bench.objective.metrics()["recursion"].values()) == {None}


def test_a_sure_head_makes_room_at_once_but_for_exploration(folder: Path, cache: Path) -> None:
    bench = Bench(folder, cache, core={"halting": {"exploration": 0.0}})
    halting_head(bench.model, 5.0)
    for _ in range(3):
        bench.step()
    assert bench.asked == list(range(12))
    row = bench.objective.metrics()["recursion"]
    assert (row["reasoning_steps"], row["halt_rate"]) == (1, 1)
    explores = Bench(folder, cache, core={"halting": {"exploration": 1.0}})
    halting_head(explores.model, 5.0)
    torch.manual_seed(1)
    for _ in range(30):
        explores.step()
    # from one to three steps, each as often
    assert 1.6 < explores.objective.metrics()["recursion"]["reasoning_steps"] < 2.4


def test_the_carry_is_that_of_the_last_step(folder: Path, cache: Path) -> None:
    bench = Bench(folder, cache)
    bench.step()
    first = bench.objective.to_tensors()
    bench.step()
    second = bench.objective.to_tensors()
    assert torch.equal(first["tokens_BC"], second["tokens_BC"])
    carry = Carry(first["z_H_BMD"], first["z_L_BMD"])
    expected = bench.model(first["tokens_BC"], carry).carry
    torch.testing.assert_close(second["z_H_BMD"], expected.z_H_BMD)
    torch.testing.assert_close(second["z_L_BMD"], expected.z_L_BMD)
    assert second["steps_B"].tolist() == [2] * 4


def test_a_failed_step_leaves_the_lanes_as_they_were(folder: Path, cache: Path) -> None:
    bench = Bench(folder, cache)
    bench.step()
    before = bench.objective.to_tensors()
    with torch.no_grad():
        bench.model.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss of the next step is nan"):
        bench.objective.gradients(1)
    after = bench.objective.to_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_micro_batches_make_the_same_gradients(folder: Path, cache: Path) -> None:
    gradients = []
    for count in (1, 2, 4):
        bench = Bench(folder, cache, grad_accum_steps=count)
        for _ in range(2):
            bench.model.zero_grad()
            work = bench.objective.gradients(0)
            bench.objective.settle(0)
        assert work.num_tokens == 80
        gradients.append({n: p.grad for n, p in bench.model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "core",
    [{}, {"halting": {"type": "q_learning"}}, {"gradient_cycles": 0, "halt_max_steps": 1}],
    ids=["q_halt", "q_learning", "one step"],
)
def test_resume_is_exact(folder: Path, cache: Path, core: dict[str, Any]) -> None:
    ema = {"ema": {"decay": 0.9}}
    whole = train(recipe(folder / "whole", core, **ema), cache)
    parts = recipe(folder / "parts", core, **ema)
    train(parts, cache, steps=8)
    for step in ("step-000004", "step-000008"):
        shutil.rmtree(folder / "parts" / "runs" / "canvas" / "checkpoints" / step)
    train(parts, cache, resume=True, steps=3)
    again = train(parts, cache, resume=True)
    for name, tensor in small.weights(whole.run).items():
        assert torch.equal(small.weights(again.run)[name], tensor)
    assert small.rows(again.run) == small.rows(whole.run)


def test_an_average_is_what_is_saved_and_validated(folder: Path, cache: Path) -> None:
    plain = train(recipe(folder / "plain"), cache)
    averaged = train(recipe(folder / "ema", ema={"decay": 0.5}), cache)
    rows = [small.rows(one.run) for one in (plain, averaged)]
    losses = [[row["loss"] for row in one if row["kind"] == "train"] for one in rows]
    # it changes nothing that is trained, and all that is seen of it
    assert losses[0] == losses[1]
    assert plain.validation is not None
    assert averaged.validation is not None
    assert plain.validation.bpb != averaged.validation.bpb


def test_an_average_forgets_what_was_drawn() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 8.0)
    average = Average(model, 0.999)
    torch.nn.init.constant_(model.weight, 1.0)
    expected = 8.0
    for step in range(40):
        average.update(step)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * 1.0
    assert float(average.tensors["weight"]) == pytest.approx(expected)
    assert expected < 1.001
    with average.applied():
        assert float(model.weight.detach()) == pytest.approx(expected)
    assert float(model.weight.detach()) == 1.0
    with pytest.raises(CheckpointError, match="trained without ema"):
        average.restore({})


def test_a_prompt_without_room_is_told_before_anything_is_trained(
    folder: Path, cache: Path
) -> None:
    with pytest.raises(RecipeError, match="has 40 tokens, and the canvas 20 cells"):
        train(recipe(folder, sample_prompts=("a" * 40,)), cache)
