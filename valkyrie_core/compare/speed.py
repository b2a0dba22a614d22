"""What a training step of each design takes, side by side: speed drifts from minute to minute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from valkyrie_core.nn.model import HybridLM
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.after_backward import StepAfterBackward
from valkyrie_core.train.device import STORED, autocast, resolve_device, resolve_precision
from valkyrie_core.train.in_backward import StepInBackward
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
    model = HybridLM(recipe.model, STORED[train.weights]).to(device)
    model.core.recomputes = train.activation_checkpointing
    optimizers = build_optimizers(train.optimizer, model)
    # as much work, and no weight moves: a design that diverges has a speed, too
    optimizers.set_lr_scale(0.0)
    routing = Routing(model, optimizers)
    update: StepAfterBackward | StepInBackward
    if train.update == "in_backward":
        update = StepInBackward(model, optimizers, train.clip_grad_norm, RuntimeError)
    else:
        update = StepAfterBackward(model, optimizers, train.clip_grad_norm, RuntimeError)
    precision = resolve_precision(train.precision, device)
    loss_of = model.loss if train.compile is None else model.compiled_loss(train.compile.mode)
    rows = train.batch_size // train.grad_accum_steps
    shape = (rows, train.context_len + 1)
    windows_BT = torch.randint(recipe.data.tokenizer.vocab_size, shape).to(device)

    def step() -> None:
        routing.restart()
        total = 0.0
        for _ in range(train.grad_accum_steps):
            with autocast(precision, device):
                state = model.init_state(rows)
                loss, _, told = loss_of(windows_BT[:, :-1], windows_BT[:, 1:], state)
            torch.autograd.backward(loss / train.grad_accum_steps)
            routing.add(told, 1 / train.grad_accum_steps)
            total += float(loss.detach()) / train.grad_accum_steps
        update.finish(total)
        routing.finish(1.0)

    return step


def _seconds(step: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count
