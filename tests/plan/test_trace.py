"""A traced step holds what a real one holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.plan.recipes import ALL, ROOT, TINY, name
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.models import Model, build_model
from valkyrie_core.plan.depth import Depths
from valkyrie_core.plan.trace import Ledger, StepMemory, Training
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.device import STORED, autocast
from valkyrie_core.train.in_backward import StepInBackward
from valkyrie_core.train.optim import build_optimizers
from valkyrie_core.train.stages import stages

CPU = torch.device("cpu")
PRECISIONS: list[Precision] = ["fp32", "bf16"]


def load(path: Path, *overrides: str) -> Recipe:
    return Recipe.load(path, ["train.state_passing=null", *overrides])


def largest(training: Training) -> StepMemory:
    steps = map(training.step, stages(training.recipe.train))
    return max(steps, key=lambda step: step.peak)


def loss_of(model: Model, tokens_BT: Tensor, doc_BT: Tensor) -> Tensor:
    if isinstance(model, Canvas):
        last_B = torch.zeros(len(tokens_BT), dtype=torch.bool)
        return model.loss(tokens_BT, tokens_BT, model.begin(len(tokens_BT)), last_B).loss
    state = model.init_state(len(tokens_BT))
    loss: Tensor = model.loss(tokens_BT, tokens_BT, state, doc_BT.contiguous())[0]
    return loss


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_recipe_is_traced(path: Path) -> None:
    assert all(step.work for step in Depths(Recipe.load(path), "fp32").steps())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", TINY, ids=name)
def test_activations_are_what_a_real_step_saves(path: Path, precision: Precision) -> None:
    recipe = load(path, "train.activation_checkpointing=false")
    stage = stages(recipe.train)[0]
    traced = Training(recipe, precision).step(stage)
    torch.manual_seed(0)
    model = build_model(recipe.model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = tensor
        return tensor

    tokens_BT = torch.randint(0, 200, (stage.micro_size, stage.context_len))
    # two documents in each row, as packing makes them
    doc_BT = (torch.arange(stage.context_len) > stage.context_len // 2).long().expand_as(tokens_BT)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(precision, CPU):
        loss = loss_of(model, tokens_BT, doc_BT)
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert loss.isfinite()
    # the state after the window and a few masks are alive without being saved
    # a gate that takes as many experts as it needs is planned with the most
    assert traced.activations == pytest.approx(real, rel=0.2 if path.stem == "moe" else 0.1)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("path", TINY, ids=name)
def test_a_fake_step_holds_what_the_same_real_step_holds(path: Path, recomputes: bool) -> None:
    recipe = load(path)
    stage = stages(recipe.train)[0]
    traced = Training(recipe, "fp32").step(stage, recomputes=recomputes)
    torch.manual_seed(0)
    model = build_model(recipe.model, STORED[recipe.train.weights])
    model.core.recomputes = recomputes
    optimizers = build_optimizers(recipe.train.optimizer, model)
    together = recipe.train.update == "after_backward"
    if not together:
        StepInBackward(model, optimizers, recipe.train.clip_grad_norm, RuntimeError)
    tokens_BT = torch.randint(0, 200, (stage.micro_size, stage.context_len))
    doc_BT = (torch.arange(stage.context_len) > stage.context_len // 2).long().expand_as(tokens_BT)
    for step in range(2):
        with Ledger() as ledger:
            if step:
                for _ in range(stage.batch_size // stage.micro_size):
                    torch.autograd.backward(loss_of(model, tokens_BT, doc_BT))
            else:
                torch.autograd.backward(sum(p.sum() for p in model.parameters()))
            if together:
                optimizers.step()
        optimizers.zero_grad()
    # its ledger begins with nothing: weights and the optimizer's state were there before
    real = ledger.peak + traced.weights + traced.optimizer
    assert traced.peak == pytest.approx(real, rel=0.12)


@pytest.mark.parametrize("path", TINY, ids=name)
def test_sizes_of_weights_and_optimizer_are_real(path: Path) -> None:
    recipe = load(path)
    training = Training(recipe, "fp32")
    model = build_model(recipe.model, STORED[recipe.train.weights])
    optimizers = build_optimizers(recipe.train.optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    state = list(optimizers.state_tensors().values())
    if recipe.train.ema is not None:
        # the average of the weights is counted with it
        state += list(model.parameters())
    weights = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    # biases of routers, and counters of experts
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert training.weights == sum(weights) + buffers
    if recipe.train.weights == "fp32":
        assert training.weights == 4 * model.num_parameters() + buffers
    # gradients that are alive together: all of them, or those of one parameter at a time
    together = recipe.train.update == "after_backward"
    assert training.gradients == (sum(weights) if together else max(weights))
    assert training.optimizer == pytest.approx(
        sum(x.numel() * x.element_size() for x in state), rel=0.001
    )
    assert all(type(x).__name__ == "FakeTensor" for x in training.model.parameters())


def test_micro_batches_and_recomputation_take_less() -> None:
    path = next(path for path in TINY if path.stem == "hybrid")
    training = Training(load(path), "fp32")
    whole = largest(training)
    again = training.step(whole.stage, recomputes=True)
    parts = training.like(load(path, "train.grad_accum_steps=4"), "fp32")
    assert parts.model is training.model
    assert again.activations < whole.activations / 2
    assert largest(parts).activations < whole.activations / 2
    assert sum(x.flops for x in again.work) > sum(x.flops for x in whole.work)
    # what is not traced twice is counted as if it were
    both = [sum(x.flops for x in step.work) for step in (largest(parts), whole)]
    assert both[0] == pytest.approx(both[1], rel=0.01)


def test_carried_states_are_held() -> None:
    path = next(path for path in TINY if path.stem == "long")
    fresh, passing = (
        Training(Recipe.load(path, o), "fp32") for o in (["train.state_passing=null"], [])
    )
    assert largest(passing).peak > largest(fresh).peak
    assert not fresh.carried_tensors()
    assert any("k_BKSH" in key for key in passing.carried_tensors())


def test_tracing_draws_no_number() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    largest(Training(load(TINY[0]), "fp32"))
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        assert largest(Training(load(TINY[0]), "fp32")).activations > 0


def test_a_ledger_forgets_what_is_gone() -> None:
    with Ledger() as ledger:
        x = torch.ones(100)
        y = x[:50] + 1
        assert ledger.now == 400 + 200
        del x
        assert ledger.now == 200
        assert y.sum() > 0
    assert ledger.peak >= 600
