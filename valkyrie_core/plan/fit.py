"""The cheapest change of a recipe that fits a budget of memory.

Changes stand in an order: what costs nothing first, what costs time next, and last what changes
what is learned: matrices in bf16, another optimizer, one sequence to a step, shorter ones. They are
`KEY=VALUE` overrides, to be pasted behind `--set`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from valkyrie_core.errors import RecipeError
from valkyrie_core.recipe import Recipe, resolve_bytes
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.fitting import SHORTEST_CONTEXT

Changes = tuple[str, ...]
"""Overrides of a recipe; none: as it is."""
Ladder = Sequence[Changes]
"""Changes of one kind, each taking less memory than the one before."""


class Proposal(NamedTuple):
    """A recipe with some changes, and what it is predicted to take."""

    changes: Changes
    peak: int
    """Bytes."""
    fits: bool


class Fit(NamedTuple):
    """What was found, and all that was looked at."""

    best: Proposal | None
    """The cheapest that fits; None: nothing does."""
    tried: tuple[Proposal, ...]
    """In the order in which they were looked at."""


def fit(
    recipe: Recipe, budget: int, peak: Callable[[Recipe], int], ladders: Sequence[Ladder]
) -> Fit:
    """Looks for the first change that fits, asking for as few predictions as it can.

    Args:
        budget: bytes that may be taken.
        peak: predicts the bytes that a recipe takes.
        ladders: kinds of changes, the cheapest kind first.
    """
    tried: list[Proposal] = []

    def proposal(changes: Changes) -> Proposal:
        known = next((one for one in tried if one.changes == changes), None)
        if known is None:
            taken = peak(changed(recipe, changes))
            known = Proposal(changes, taken, taken <= budget)
            tried.append(known)
        return known

    for ladder in ladders:
        rungs = [changes for changes in ladder if is_possible(recipe, changes)]
        # where the last rung does not fit, none does
        if not rungs or not proposal(rungs[-1]).fits:
            continue
        low, high = -1, len(rungs) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if proposal(rungs[middle]).fits:
                high = middle
            else:
                low = middle
        return Fit(proposal(rungs[high]), tuple(tried))
    return Fit(None, tuple(tried))


def ladders(recipe: Recipe) -> Iterator[Ladder]:
    """What may be changed, the cheapest kind first: nothing; more and smaller micro-batches;
    activation checkpointing (a third more operations); both; what `train.fit` would do."""
    train = recipe.train
    counts = range(train.grad_accum_steps + 1, train.batch_size + 1)
    smaller = [(f"train.grad_accum_steps={n}",) for n in counts if train.batch_size % n == 0]
    yield [()]
    yield smaller
    if not train.activation_checkpointing:
        again = "train.activation_checkpointing=true"
        yield [(again,)]
        yield [(*one, again) for one in smaller]
    yield [(*_little_memory(train), *shorter) for shorter in _shorter(train.context_len)]


def _little_memory(train: SupervisedConfig) -> Changes:
    """What `train.fit` would do: one sequence to a step, updates inside the backward pass."""
    keeps = train.optimizer.type == "adafactor"
    return (
        "train.activation_checkpointing=true",
        "train.grad_accum_steps=1",
        "train.batch_size=1",
        *(() if keeps else ("train.optimizer={type: adafactor}",)),
        "train.weights=bf16",
        *(("train.ema=null",) if train.ema else ()),
        "train.update=in_backward",
        *(("train.context_schedule=[]",) if train.context_schedule else ()),
    )


def _shorter(context_len: int) -> Iterator[Changes]:
    """The context as it is, and half as long again and again."""
    yield ()
    while context_len % 2 == 0 and context_len // 2 >= SHORTEST_CONTEXT:
        context_len //= 2
        yield (f"train.context_len={context_len}",)


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other values. RecipeError where they don't go together."""
    return resolve_bytes(recipe.to_json().encode(), recipe.name, changes).recipe


def is_possible(recipe: Recipe, changes: Changes) -> bool:
    """Whether the changes go with the rest of the recipe."""
    try:
        changed(recipe, changes)
    except RecipeError:
        return False
    return True
