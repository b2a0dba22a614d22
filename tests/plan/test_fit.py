"""What is proposed where memory is short: a pure search over predictions."""

from __future__ import annotations

import pytest

from tests.plan.recipes import TINY
from valkyrie_core.plan.fit import Fit, fit, ladders
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
