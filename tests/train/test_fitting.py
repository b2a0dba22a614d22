"""A training that is too large is made smaller, in a fixed order, and says what it changed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from valkyrie_core import Recipe
from valkyrie_core.errors import ResourceError, UsageError
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.fitting import FITTED, StepCost, as_fitted, fit, tokens_per_step


def training(**changes: Any) -> SupervisedConfig:
    settings = {
        "steps": 10,
        "batch_size": 8,
        "grad_accum_steps": 2,
        "context_len": 1024,
        "optimizer": {"type": "muon"},
        "fit": {"step_seconds": 100},
    }
    return SupervisedConfig.model_validate(settings | changes)


def memory_of(train: SupervisedConfig) -> int:
    """A model of 1000 weights whose activations are a byte per token."""
    weights = 2 if train.weights == "bf16" else 4
    gradients = 0 if train.update == "in_backward" else weights
    moments = {"muon": 4, "adamw": 8, "adafactor": 0}[train.optimizer.type]
    tokens = tokens_per_step(train) // train.grad_accum_steps
    kept = tokens // 4 if train.activation_checkpointing else tokens
    return 1000 * (weights + gradients + moments) + kept


def cost(train: SupervisedConfig) -> StepCost:
    return StepCost(memory_of(train), tokens_per_step(train) / 100)


def test_what_fits_stays_as_it_is_written() -> None:
    train = training()
    assert fit(train, cost, 20_000) == (train, cost(train), ())


@pytest.mark.parametrize(
    ("memory", "changed"),
    [
        (13_500, {"activation_checkpointing"}),
        (12_300, {"activation_checkpointing", "grad_accum_steps"}),
        (2_300, {"weights", "optimizer", "update", "batch_size", "context_len"}),
        (2_020, {"weights", "optimizer", "update", "batch_size", "context_len"}),
    ],
)
def test_the_least_change_comes_first(memory: int, changed: set[str]) -> None:
    fitted = fit(training(), cost, memory)
    assert fitted.cost.peak_bytes <= memory
    assert fitted.cost == cost(fitted.train)
    keys = {change.key for change in fitted.changes} - {"eval_tokens", "save_every"}
    if memory > 3000:
        assert keys == changed
    else:
        assert changed - {"context_len"} <= keys
        assert fitted.train.grad_accum_steps == 1


def test_slow_steps_have_fewer_tokens() -> None:
    fitted = fit(training(fit={"step_seconds": 11}), cost, 20_000)
    assert tokens_per_step(fitted.train) == 1024
    assert {change.key for change in fitted.changes} >= {"batch_size"}
    assert fitted.train.optimizer == training().optimizer, "it fits: nothing else changes"
    longer = fit(training(fit={"step_seconds": 3}), cost, 20_000)
    assert (longer.train.batch_size, longer.train.context_len) == (1, 256)


def test_slow_steps_are_saved_and_validated_at_their_pace() -> None:
    fitted = fit(training(save_every=500, eval_tokens=10**6), cost, 2_300)
    assert fitted.train.save_every == max(1, int(1800 / fitted.cost.seconds))
    assert fitted.train.eval_tokens == max(256, tokens_per_step(fitted.train))


def test_saves_become_no_rarer_and_validations_no_shorter_without_need() -> None:
    # a validation every 10 steps is a checkpoint every 10
    often = fit(training(steps=10_000, eval_every=10, eval_tokens=10**6), cost, 13_500).train
    assert often.activation_checkpointing
    assert often.save_every is None
    assert often.eval_tokens == 10**6


def test_what_does_not_go_with_a_fitted_run_is_told() -> None:
    written = training()
    fitted = fit(written, cost, 13_000).train
    assert fitted.grad_accum_steps > 1
    odd = training(batch_size=fitted.batch_size - 1, grad_accum_steps=1)
    with pytest.raises(UsageError, match=r"train\.grad_accum_steps.*must divide"):
        as_fitted(fitted, odd)
    with pytest.raises(ValidationError):
        training(fit={"changed": ["foo"]})


def test_what_can_not_fit_is_an_error() -> None:
    with pytest.raises(ResourceError, match=r"does not fit: in the least memory") as caught:
        fit(training(), cost, 1_000)
    assert caught.value.exit_code == 7


def test_changes_tell_before_and_after() -> None:
    fitted = fit(training(), cost, 13_500)
    assert fitted.changes[0] == ("activation_checkpointing", False, True)


def test_a_run_goes_on_as_it_was_begun() -> None:
    written = training()
    fitted = fit(written, cost, 2_300).train
    assert as_fitted(fitted, written) == fitted
    # what `fit` never changes still comes from the recipe that is given
    assert as_fitted(fitted, training(log_every=3)).log_every == 3
    # and so does what was not changed then, whether it may change or not
    other = as_fitted(fitted, training(clip_grad_norm=0.5))
    assert other.clip_grad_norm == 0.5
    assert set(fitted.fit.changed) == {c.key for c in fit(written, cost, 2_300).changes}
    untouched = fit(written, cost, 20_000).train
    assert as_fitted(untouched, training(batch_size=4)).batch_size == 4
    plain = training(fit=None)
    assert as_fitted(fitted, plain) == plain


def test_an_adafactor_that_is_there_keeps_its_settings() -> None:
    written = training(optimizer={"type": "adafactor", "lr": 1e-3, "weight_decay": 0.1})
    fitted = fit(written, cost, 2_300)
    assert fitted.train.optimizer == written.optimizer
    assert "optimizer" not in {change.key for change in fitted.changes}


@pytest.mark.parametrize(("batch_size", "context_len"), [(3, 100), (1, 300), (7, 129)])
def test_odd_sizes_are_made_smaller_too(batch_size: int, context_len: int) -> None:
    written = training(
        batch_size=batch_size, context_len=context_len, grad_accum_steps=1, fit={"step_seconds": 1}
    )
    found = fit(written, cost, 20_000)
    assert found.train.batch_size == 1
    assert 64 <= found.train.context_len < 128


def test_only_listed_keys_change() -> None:
    written = training(context_schedule=[{"from_fraction": 0.5, "context_len": 2048}])
    fitted = fit(written, cost, 2_050).train
    before, after = written.model_dump(), fitted.model_dump()
    assert {key for key in before if before[key] != after[key]} <= {*FITTED, "fit"}


def test_the_recipes_at_3b_name_it() -> None:
    for name in ("3b_hybrid", "3b_transformer"):
        assert Recipe.load(name).train.fit is not None
