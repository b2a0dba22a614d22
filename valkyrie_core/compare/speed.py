"""What a training step of each design takes, side by side: speed drifts from minute to minute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from valkyrie_core.data.batch import Batch
from valkyrie_core.data.questions import Question
from valkyrie_core.errors import DivergedError
from valkyrie_core.nn.models import build_model
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.after_backward import StepAfterBackward
from valkyrie_core.train.device import STORED, resolve_device, resolve_precision
from valkyrie_core.train.in_backward import StepInBackward
from valkyrie_core.train.objective import Running
from valkyrie_core.train.objectives import build_objective
from valkyrie_core.train.optim import build_optimizers
from valkyrie_core.train.routing import Routing

ROUNDS = 5
WARM_UP = 2
ROUND_SECONDS = 0.5
"""A round is so many steps of a design that they take at least this long."""


def step_seconds(
    recipes: Mapping[str, Recipe], *, told: Callable[[str], None] = lambda _text: None
) -> dict[str, float]:
    """Seconds of one optimizer step over tokens drawn at random, the median of rounds.

    Every other round goes backwards, so that no design always comes after the same one.
    """
    steps = {name: training_step(recipe) for name, recipe in recipes.items()}
    counts = {}
    told("first steps")
    for name, step in steps.items():
        last = min(_seconds(step, 1) for _ in range(WARM_UP))
        counts[name] = max(1, round(ROUND_SECONDS / max(last, 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in recipes}
    names = list(recipes)
    for number in range(ROUNDS):
        told(f"round {number + 1} of {ROUNDS}")
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(_seconds(steps[name], counts[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def training_step(recipe: Recipe) -> Callable[[], None]:
    """One optimizer step of a new model, as the trainer makes it, without data and bookkeeping."""
    torch.manual_seed(0)
    train, device = recipe.train, resolve_device(recipe.device)
    model = build_model(recipe.model, STORED[train.weights]).to(device)
    model.core.recomputes = train.activation_checkpointing
    optimizers = build_optimizers(train.optimizer, model)
    # as much work, and no weight moves: a design that diverges has a speed, too
    optimizers.set_lr_scale(0.0)
    routing = Routing(model, optimizers)
    update: StepAfterBackward | StepInBackward
    if train.update == "in_backward":
        update = StepInBackward(model, optimizers, train.clip_grad_norm, DivergedError)
    else:
        update = StepAfterBackward(model, optimizers, train.clip_grad_norm, DivergedError)
    precision = resolve_precision(train.precision, device)
    running = Running(precision, device, lambda: None, DivergedError)
    # no state is carried: all steps are alike
    alone = train.model_copy(update={"state_passing": None, "context_schedule": ()})
    shape = (train.batch_size, train.context_len + 1)
    windows_BT = torch.randint(recipe.data.tokenizer.vocab_size, shape)
    batch = Batch(windows_BT[:, :-1], windows_BT[:, 1:], torch.zeros_like(windows_BT[:, 1:]))
    question = Question(windows_BT[0, :-1], windows_BT[0, 1:])
    objective = build_objective(alone, model, lambda _: batch, lambda _: question, routing, running)

    def step() -> None:
        routing.restart()
        update.finish(objective.gradients(0).loss)
        routing.finish(1.0)
        objective.settle(0)

    return step


def _seconds(step: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count
