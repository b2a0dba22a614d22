"""What is proposed where memory is short: a pure search over predictions."""

from __future__ import annotations

import pytest

from tests.plan.recipes import TINY
from valkyrie_core.plan.fit import Fit, changed, fit, ladders
from valkyrie_core.recipe import Recipe


@pytest.fixture
def recipe() -> Recipe:
    path = next(path for path in TINY if path.stem == "hybrid")
    return Recipe.load(path, ["train.batch_size=8"])


def peak(recipe: Recipe) -> int:
    """1000, a hundred for each sequence of a micro-batch, a fifth of that when recomputed."""
    each = 20 if recipe.train.activation_checkpointing else 100
    return 1000 + each * recipe.train.batch_size // recipe.train.grad_accum_steps


def search(recipe: Recipe, budget: int) -> Fit:
    return fit(recipe, budget, peak, list(ladders(recipe)))


@pytest.mark.parametrize(
    ("budget", "changes"),
    [
        (1800, ()),
        (1799, ("train.grad_accum_steps=2",)),
        (1250, ("train.grad_accum_steps=4",)),
        (1100, ("train.grad_accum_steps=8",)),
        (1099, ("train.grad_accum_steps=2", "train.activation_checkpointing=true")),
        (1020, ("train.grad_accum_steps=8", "train.activation_checkpointing=true")),
    ],
)
def test_the_cheapest_change_that_fits(
    recipe: Recipe, budget: int, changes: tuple[str, ...]
) -> None:
    found = search(recipe, budget)
    assert found.best is not None
    assert found.best.changes == changes
    assert found.best.peak <= budget


def test_checkpointing_comes_before_both(recipe: Recipe) -> None:
    single = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 1})})
    found = search(single, 1050)
    assert found.best is not None
    assert found.best.changes == ("train.activation_checkpointing=true",)


def test_little_memory_comes_last_and_loads(recipe: Recipe) -> None:
    def narrow(one: Recipe) -> int:
        return peak(one) // (2 if one.train.weights == "bf16" else 1)

    found = fit(recipe, 600, narrow, list(ladders(recipe)))
    assert found.best is not None
    assert found.best.changes == list(ladders(recipe))[-1][0]
    changed_recipe = changed(recipe, found.best.changes)
    assert changed_recipe.train.update == "in_backward"
    long = recipe.model_copy(update={"train": recipe.train.model_copy(update={"context_len": 256})})

    def by_context(one: Recipe) -> int:
        return narrow(one) + one.train.context_len

    found = fit(long, 640, by_context, list(ladders(long)))
    assert found.best is not None
    assert found.best.changes[-1] == "train.context_len=128"


def test_little_memory_is_what_fitting_makes_of_it(recipe: Recipe) -> None:
    """A schedule goes, and an adafactor that is there stays as it is."""
    train = {
        **recipe.train.model_dump(),
        "optimizer": {"type": "adafactor", "lr": 0.001, "weight_decay": 0.1},
        "context_schedule": [{"from_fraction": 0.5, "context_len": 2 * recipe.train.context_len}],
    }
    staged = recipe.model_copy(update={"train": recipe.train.model_validate(train)})
    last = list(ladders(staged))[-1]
    made = changed(staged, last[0]).train
    assert made.context_len == recipe.train.context_len
    assert made.context_schedule == ()
    assert made.optimizer == staged.train.optimizer


def test_nothing_fits(recipe: Recipe) -> None:
    found = search(recipe, 1019)
    assert found.best is None
    assert min(one.peak for one in found.tried) == 1020


def test_asks_for_few_predictions(recipe: Recipe) -> None:
    asked: list[Recipe] = []

    def counting(one: Recipe) -> int:
        asked.append(one)
        return peak(one)

    fit(recipe, 1250, counting, list(ladders(recipe)))
    assert len(asked) <= 4
    assert len(set(map(Recipe.fingerprint, asked))) == len(asked)


def test_what_does_not_go_together_is_left_out(recipe: Recipe) -> None:
    found = fit(recipe, 0, peak, [[("train.grad_accum_steps=3",)], [("train.nonsense=1",)]])
    assert found == Fit(None, ())
