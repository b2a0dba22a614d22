"""Making designs comparable: one text, one order, one budget."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import ValidationError

from valkyrie_core.allocate.match import matched
from valkyrie_core.compare.contenders import Contender, design_hash
from valkyrie_core.errors import UsageError
from valkyrie_core.inventory import find_run
from valkyrie_core.nn.routers import foreseen
from valkyrie_core.plan.flops import training_flops
from valkyrie_core.plan.parameters import weightless
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.stages import stages

Match = Literal["tokens", "params", "flops", "seconds"]
SHARED = (
    *("batch_size", "context_len", "context_schedule", "state_passing"),
    *("eval_every", "eval_tokens", "save_every", "log_every"),
)
"""Keys of `train` that decide what is read when; all take the reference's."""
LONG_WARMUP = 0.25
"""A warm-up of a greater share of the steps is told."""
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
    for one in designs:
        if one.recipe.train.fit is not None:
            raise UsageError(
                f"{one.name} has train.fit, which changes a design to fit this machine",
                hint="compare recipes without it; `valkyrie train` says what it would change",
            )
    first = _from_weights(designs[0])
    if steps is not None:
        first = _train(first, steps=steps)
    if first.train.eval_steps > max(1, first.train.steps // 4):
        # a curve of one point tells nothing
        first = _train(first, eval_every=max(1, first.train.steps // 10))
    recipes, notes = {designs[0].name: first}, []
    for one in designs:
        if one.recipe.train.init_from is not None:
            notes.append(f"{one.name} starts from the weights of {one.recipe.train.init_from}")
    for one in designs[1:]:
        recipe = _from_weights(one)
        # the order of corpora is the order in which they are drawn
        if _text(recipe) != _text(first):
            notes.append(f"{one.name} reads {designs[0].name}'s text, with its tokenizer")
            size = first.data.tokenizer.vocab_size
            model = recipe.model.model_copy(update={"vocab_size": size})
            memory = {"memory_tokens": recipe.data.memory_tokens}
            data = first.data.model_copy(update=memory)
            recipe = recipe.model_copy(update={"data": data, "model": model})
        changes = {
            key: getattr(first.train, key)
            for key in (*_shared(recipe, first), "steps")
            if getattr(recipe.train, key) != getattr(first.train, key)
            and f"train.{key}" not in varied
        }
        # values of one recipe's keys: what is changed is changed for all alike
        if changes and not varied:
            told = ", ".join(
                f"{key} {_told(getattr(recipe.train, key))} -> {_told(value)}"
                for key, value in changes.items()
            )
            notes.append(f"{one.name} trains as {designs[0].name} does: {told}")
        recipe = _train(recipe, **changes)
        parts = math.gcd(recipe.train.grad_accum_steps, recipe.train.batch_size)
        if parts != recipe.train.grad_accum_steps:
            was = recipe.train.grad_accum_steps
            notes.append(
                f"{one.name}: grad_accum_steps {was} -> {parts}, which changes no gradient"
            )
            recipe = _train(recipe, grad_accum_steps=parts)
        if (recipe.device, recipe.train.precision) != (first.device, first.train.precision):
            notes.append(
                f"{one.name} trains on {recipe.device} in {recipe.train.precision}, "
                f"{designs[0].name} on {first.device} in {first.train.precision}"
            )
        recipes[one.name] = _valid(recipe, one.name)
    return recipes, notes


def _text(recipe: Recipe) -> str:
    return recipe.data.model_dump_json(exclude={"memory_tokens"})


def _shared(recipe: Recipe, first: Recipe) -> tuple[str, ...]:
    """What both read when; a canvas has a question a row, and no windows of text."""
    kinds = {one.model.core.type == "canvas" for one in (recipe, first)}
    if kinds == {True, False}:
        own = ("batch_size", "context_len", "context_schedule", "state_passing")
        return tuple(key for key in SHARED if key not in own)
    return SHARED


def _from_weights(one: Contender) -> Recipe:
    """The recipe with a place where `init_from` is found, wherever the training lies.

    Raises MissingError where it is not.
    """
    source = one.recipe.train.init_from
    if source is None:
        return one.recipe
    return _train(one.recipe, init_from=str(find_run(source, one.recipe.runs_dir).path.resolve()))


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
        if match == "tokens":
            # a step that reads more tokens is one of fewer
            ratio = tokens_of(first) / tokens_of(recipe)
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
                ratio = flops_of(first) / flops_of(recipe)
                if recipe.train.steps != first.train.steps:
                    ratio *= recipe.train.steps / first.train.steps
            else:
                ratio = step_seconds[names[0]] / step_seconds[name]
            steps = max(1, round(first.train.steps * ratio))
            recipe = _train(recipe, steps=steps)
            what = "FLOPs" if match == "flops" else "seconds"
            notes.append(_budget(name, steps, names[0], first, what))
        found[name] = recipe
    for name, recipe in found.items():
        warmup = recipe.train.schedule.warmup_steps
        if warmup > LONG_WARMUP * recipe.train.steps:
            notes.append(
                f"{name} warms up for {min(warmup, recipe.train.steps):,} of its "
                f"{recipe.train.steps:,} steps"
            )
    return found, notes


def shortened(recipe: Recipe, share: float) -> Recipe:
    """The recipe with a share of its steps and of its warm-up; at least one step."""
    schedule = recipe.train.schedule
    schedule = schedule.model_copy(update={"warmup_steps": round(share * schedule.warmup_steps)})
    steps = max(1, round(share * recipe.train.steps))
    return _train(recipe, steps=steps, schedule=schedule)


def _budget(name: str, steps: int, reference: str, first: Recipe, what: str) -> str:
    own = f"{first.train.steps:,}"
    return f"{name} trains {steps:,} steps where {reference} trains {own}: equal {what}"


def usual_place(reference: Contender, runs_dir: str) -> str:
    """Where runs live: what was said, else where the first recipe says."""
    if runs_dir == USUAL and reference.run is None:
        return reference.recipe.runs_dir
    return runs_dir


def trials(
    recipes: Mapping[str, Recipe],
    designs: Sequence[Contender],
    seeds: range,
    runs_dir: str,
    text: str,
) -> list[Trial]:
    """Every training, seed by seed, so that an interrupted comparison has whole seeds.

    All have the same seeds, so that a pair reads the same text in the same order. A design that is
    there before has the next ones: with the same seeds it would be the same training.

    Args:
        runs_dir: where runs live; trainings go into a folder of it.
        text: the fingerprint of what is read; another text is another training.
    """
    hashes = [design_hash(recipes[one.name]) for one in designs]
    found = []
    for first_seed in seeds:
        for place, one in enumerate(designs):
            recipe = recipes[one.name]
            again = hashes[:place].count(hashes[place])
            seed = first_seed + again * len(seeds)
            # a run that goes on has to validate as it did
            validation = f"{recipe.train.eval_every} {recipe.train.eval_tokens}"
            whole = f"{hashes[place]} {text} {validation}"
            key = hashlib.sha256(whole.encode()).hexdigest()[:8]
            name = f"{one.recipe.name[:60]}-{key}-seed{seed}"
            update = {"name": name, "seed": seed, "runs_dir": f"{runs_dir}/{FOLDER}"}
            found.append(Trial(one.name, seed, recipe.model_copy(update=update)))
    return found


def flops_of(recipe: Recipe) -> int:
    """FLOPs of the whole training, by formula, every stage at its own context."""
    model, total = foreseen(weightless(recipe.model)), 0
    parts = stages(recipe.train)
    ends = [*(part.first_step for part in parts[1:]), recipe.train.steps]
    for part, end in zip(parts, ends, strict=True):
        tokens = (end - part.first_step) * part.batch_size * part.context_len
        total += tokens * sum(training_flops(model, part.context_len).values())
    return total


def tokens_of(recipe: Recipe) -> int:
    """Tokens that the whole training reads."""
    return recipe.train.steps * recipe.train.batch_size * recipe.train.context_len


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
    return text if len(text) < 40 else "..."
