"""Making designs comparable: one text, one order, one budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import ValidationError

from valkyrie_core.allocate.match import matched
from valkyrie_core.compare.contenders import Contender, design_hash
from valkyrie_core.errors import UsageError
from valkyrie_core.plan.flops import training_flops
from valkyrie_core.plan.parameters import weightless
from valkyrie_core.recipe import Recipe

Match = Literal["tokens", "params", "flops", "seconds"]
SHARED = (
    *("batch_size", "context_len", "context_schedule", "state_passing"),
    *("eval_every", "eval_tokens", "save_every", "log_every"),
)
"""Keys of `train` that decide what is read when; all take the reference's."""
USUAL = "runs"
FOLDER = "compare"
"""Runs of comparisons live here, in the folder of runs."""


class Trial(NamedTuple):
    """One training."""

    contender: str
    seed: int
    recipe: Recipe
    """Whole, with its name."""


def on_one_text(
    designs: Sequence[Contender], steps: int | None, varied: Collection[str] = ()
) -> tuple[dict[str, Recipe], list[str]]:
    """Every design with the reference's text, order, evaluation and steps; what was changed.

    Args:
        steps: of the reference; None: its recipe's.
        varied: keys that are compared, and stay as they are.
    """
    first = designs[0].recipe
    if steps is not None:
        first = _train(first, steps=steps)
    recipes, notes = {designs[0].name: first}, []
    for one in designs[1:]:
        recipe = one.recipe
        if recipe.data != first.data:
            notes.append(f"{one.name} reads {designs[0].name}'s text, with its tokenizer")
            size = first.data.tokenizer.vocab_size
            model = recipe.model.model_copy(update={"vocab_size": size})
            recipe = recipe.model_copy(update={"data": first.data, "model": model})
        changes = {
            key: getattr(first.train, key)
            for key in (*SHARED, "steps")
            if getattr(recipe.train, key) != getattr(first.train, key)
            and f"train.{key}" not in varied
        }
        if changes:
            told = ", ".join(
                f"{key} {_told(getattr(recipe.train, key))} -> {_told(value)}"
                for key, value in changes.items()
            )
            notes.append(f"{one.name} trains as {designs[0].name} does: {told}")
        recipes[one.name] = _valid(_train(recipe, **changes), one.name)
    return recipes, notes


def at_equal(
    recipes: Mapping[str, Recipe], match: Match, step_seconds: Mapping[str, float]
) -> tuple[dict[str, Recipe], list[str]]:
    """Every design with the reference's budget; what was changed.

    Args:
        step_seconds: by name, what a step takes; of use for `seconds` alone.

    Raises UsageError where a design can't be resized to the reference's parameters.
    """
    names = list(recipes)
    first = recipes[names[0]]
    context = first.train.context_len
    found, notes = {names[0]: first}, []
    for name in names[1:]:
        recipe = recipes[name]
        if match == "tokens" and recipe.train.steps == first.train.steps:
            # a step that reads more tokens is one of fewer
            ratio = tokens_per_step(first) / tokens_per_step(recipe)
            steps = max(1, round(first.train.steps * ratio))
            if steps != first.train.steps:
                recipe = _train(recipe, steps=steps)
                notes.append(_budget(name, steps, names[0], first, "tokens"))
        elif match == "params":
            model, how = matched(
                recipe.model, like=first.model, match="params", context_len=context
            )
            recipe = recipe.model_copy(update={"model": model})
            notes += [f"{name}: {note}" for note in how.notes]
        elif match in ("flops", "seconds"):
            if match == "flops":
                ratio = flops_per_token(first) / flops_per_token(recipe)
            else:
                ratio = step_seconds[names[0]] / step_seconds[name]
            steps = max(1, round(first.train.steps * ratio))
            recipe = _train(recipe, steps=steps)
            what = "FLOPs" if match == "flops" else "seconds"
            notes.append(_budget(name, steps, names[0], first, what))
        found[name] = recipe
    return found, notes


def _budget(name: str, steps: int, reference: str, first: Recipe, what: str) -> str:
    own = f"{first.train.steps:,}"
    return f"{name} trains {steps:,} steps where {reference} trains {own}: equal {what}"


def trials(
    recipes: Mapping[str, Recipe], designs: Sequence[Contender], seeds: int, runs_dir: str
) -> list[Trial]:
    """Every training, seed by seed, so that an interrupted comparison has whole seeds.

    Args:
        runs_dir: where runs live; the usual folder: where the first recipe says.
    """
    if runs_dir == USUAL:
        runs_dir = designs[0].recipe.runs_dir
    found = []
    for number in range(seeds):
        for one in designs:
            recipe = recipes[one.name]
            seed = one.recipe.seed + number
            name = f"{one.recipe.name[:60]}-{design_hash(recipe)[:8]}-seed{seed}"
            update = {"name": name, "seed": seed, "runs_dir": f"{runs_dir}/{FOLDER}"}
            found.append(Trial(one.name, seed, recipe.model_copy(update=update)))
    return found


def flops_per_token(recipe: Recipe) -> int:
    """Training FLOPs, by formula."""
    context = recipe.train.context_len
    return sum(training_flops(weightless(recipe.model), context).values())


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens that one optimizer step reads."""
    return recipe.train.batch_size * recipe.train.context_len


def _train(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _valid(recipe: Recipe, name: str) -> Recipe:
    """The same. Raises UsageError where keys of two recipes don't go together."""
    try:
        return Recipe.model_validate_json(recipe.to_json())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{name} can't be trained as the first design is: {place}: {first['msg']}"
        ) from None


def _told(value: object) -> str:
    text = str(value)
    return text if len(text) < 40 else "its own"
