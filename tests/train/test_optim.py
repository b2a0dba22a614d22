from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from valkyrie_core.errors import CheckpointError
from valkyrie_core.train.muon import Muon, StackedMuon, orthogonalised
from valkyrie_core.train.optim import AdamWConfig, MuonConfig, build_optimizers


class Toy(nn.Module):
    """One parameter of every role."""

    roles: ClassVar[dict[str, str]] = {"w0": "decay", "w1": "low_rank", "cube": "matrix"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.w0 = nn.Parameter(torch.randn(4))
        self.w1 = nn.Parameter(torch.randn(4, 2))
        self.cube = nn.Parameter(torch.randn(2, 4, 4))


CONFIGS: list[Any] = [AdamWConfig(lr=0.01), MuonConfig(lr=0.02, adamw=AdamWConfig(lr=0.01))]


def put_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def groups_of(optimizers: Any) -> dict[str, tuple[str, float, float]]:
    """name -> (optimizer, learning rate, weight decay)"""
    return {
        name: (type(optimizer).__name__, group.lr, group.weight_decay)
        for optimizer, groups in optimizers._parts
        for group in groups
        for name in group.names
    }


def test_adamw_decays_matrices_only_and_doubles_the_decay_rate() -> None:
    groups = groups_of(build_optimizers(AdamWConfig(lr=0.01, weight_decay=0.1), Toy()))
    assert groups == {
        "embedding.weight": ("AdamW", 0.01, 0.0),
        "hidden.weight": ("AdamW", 0.01, 0.1),
        "hidden.bias": ("AdamW", 0.01, 0.0),
        "w0": ("AdamW", 0.02, 0.0),
        "w1": ("AdamW", 0.01, 0.0),
        "cube": ("AdamW", 0.01, 0.1),
    }


def test_muon_takes_matrices_and_stacks_of_them() -> None:
    groups = groups_of(build_optimizers(CONFIGS[1], Toy()))
    assert groups.pop("hidden.weight") == ("Muon", 0.02, 0.1)
    # torch's own refuses three dimensions
    assert groups.pop("cube") == ("StackedMuon", 0.02, 0.1)
    assert {group[0] for group in groups.values()} == {"AdamW"}


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (4, 12, 5), (1, 6, 7)])
def test_a_stack_is_updated_as_each_of_its_matrices_alone(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(shape))
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    stacked = StackedMuon([stack], **settings)
    # ours where bf16 is emulated, else torch's
    plain = Muon(alone, adjust_lr_fn="original", **settings)
    for step in range(4):
        torch.manual_seed(step)
        stack.grad = torch.randn(shape)
        for matrix, gradient in zip(alone, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        stacked.step()
        plain.step()
    # bf16 products are rounded once more where they are added to
    torch.testing.assert_close(stack.detach(), torch.stack(list(alone)), rtol=0, atol=1e-3)
    before = torch.stack([m.detach() for m in alone])
    assert (stack.detach() - before).abs().mean() < 2e-4


def test_what_is_known_of_one_row_is_forgotten() -> None:
    for config in CONFIGS:
        model = Toy()
        optimizers = build_optimizers(config, model)
        put_gradients(model, 0)
        optimizers.step()
        before = {key: value.clone() for key, value in optimizers.state_tensors().items()}
        optimizers.forget(model.cube, 1)
        for key, value in optimizers.state_tensors().items():
            if key.startswith("cube/") and value.dim():
                assert not value[1].any()
                assert value[0].any()
                torch.testing.assert_close(value[0], before[key][0])
            else:
                torch.testing.assert_close(value, before[key])


def test_weight_decay_shrinks_a_matrix_without_gradient_and_nothing_else() -> None:
    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(AdamWConfig(lr=0.1, weight_decay=0.5), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("hidden.weight", "cube") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_the_rate_of_the_decay_bias_is_twice_as_high() -> None:
    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(AdamWConfig(lr=0.01, weight_decay=0.0, eps=1e-12), model)
    optimizers.set_lr_scale(0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    # Adam's first step is the learning rate
    torch.testing.assert_close(before["w1"] - model.w1.detach(), torch.full((4, 2), 0.005))
    torch.testing.assert_close(before["w0"] - model.w0.detach(), torch.full((4,), 0.01))


def test_muon_updates_are_orthogonal_and_scale_with_the_rate() -> None:
    model = Toy()
    before = model.hidden.weight.detach().clone()
    optimizers = build_optimizers(MuonConfig(lr=0.02, weight_decay=0.0), model)
    put_gradients(model, 0)
    optimizers.step()
    update = (before - model.hidden.weight.detach()) / 0.02
    singular = torch.linalg.svdvals(update)
    assert bool(((singular > 0.5) & (singular < 1.6)).all())


@pytest.mark.parametrize("config", CONFIGS)
def test_state_survives_the_trip_bit_for_bit(config: Any) -> None:
    whole, split = Toy(), Toy()
    optimizers = build_optimizers(config, whole)
    first = build_optimizers(config, split)
    for step in range(3):
        put_gradients(whole, step)
        optimizers.step()
        put_gradients(split, step)
        first.step()
    second = build_optimizers(config, split)
    stored = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    second.load_state_tensors(stored)
    assert second.state_tensors().keys() == stored.keys() != set()
    for step in range(3, 6):
        for model, optimizer in ((whole, optimizers), (split, second)):
            put_gradients(model, step)
            optimizer.set_lr_scale(0.5)
            optimizer.step()
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, tensor in optimizers.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name])


def test_state_of_another_model_is_refused() -> None:
    optimizers = build_optimizers(AdamWConfig(), Toy())
    with pytest.raises(CheckpointError, match="elsewhere"):
        optimizers.load_state_tensors({"elsewhere/exp_avg": torch.zeros(3)})


def test_a_fresh_optimizer_has_no_state_and_loads_none() -> None:
    optimizers = build_optimizers(CONFIGS[1], Toy())
    assert optimizers.state_tensors() == {}
    optimizers.load_state_tensors({})


def test_rates_are_reported_by_optimizer() -> None:
    optimizers = build_optimizers(CONFIGS[1], Toy())
    optimizers.set_lr_scale(0.5)
    assert optimizers.learning_rates() == {"muon": 0.01, "adamw": 0.005}


def test_frozen_parameters_are_left_out() -> None:
    model = Toy()
    model.embedding.weight.requires_grad_(False)
    names = {name for name, _ in build_optimizers(AdamWConfig(), model).named_parameters()}
    assert "embedding.weight" not in names
    assert len(names) == 5


def test_muon_without_bf16_instructions_computes_the_same_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after = {}
    for bf16 in (True, False):
        monkeypatch.setattr("valkyrie_core.train.muon.supports_bf16", lambda _device, b=bf16: b)
        model = Toy()
        optimizers = build_optimizers(CONFIGS[1], model)
        for seed in range(3):
            put_gradients(model, seed)
            optimizers.step()
        after[bf16] = (model.hidden.weight.detach(), optimizers.state_tensors())
    weight, state = after[False]
    assert torch.equal(
        state["hidden.weight/momentum_buffer"], after[True][1]["hidden.weight/momentum_buffer"]
    )
    # three updates of size 0.02, each rounded to bf16 at every product
    torch.testing.assert_close(weight, after[True][0], atol=2e-3, rtol=0)
    assert not torch.equal(weight, Toy().hidden.weight)


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_orthogonalised_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = orthogonalised(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert float(values.max()) < 1.3
    assert float(values.min()) > 0.3
