"""Updates inside the backward pass: the same numbers, no gradient kept, a bad one ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import small
from tests.train.test_trainer import Bench, Poisoned
from valkyrie_core.errors import DivergedError
from valkyrie_core.train.after_backward import StepAfterBackward
from valkyrie_core.train.checkpoint import list_checkpoints
from valkyrie_core.train.in_backward import StepInBackward

ADAFACTOR = {"type": "adafactor", "lr": 0.02}
NEVER = 1e9
"""A norm that no gradient has: nothing is clipped."""


def weights_after(folder: Path, update: str, **settings: Any) -> dict[str, torch.Tensor]:
    bench = Bench(folder, steps=4, update=update, **settings)
    bench.fit()
    return dict(bench.newest())


@pytest.mark.parametrize(
    "optimizer", [{"type": "adamw"}, small.MUON, ADAFACTOR], ids=lambda o: o["type"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_clipping_it_gives_the_same_bits(
    optimizer: dict[str, Any], checkpointing: bool, folder: Path
) -> None:
    settings = {
        "optimizer": optimizer,
        "clip_grad_norm": NEVER,
        "activation_checkpointing": checkpointing,
    }
    after = weights_after(folder, "after_backward", **settings)
    inside = weights_after(folder, "in_backward", **settings)
    assert after.keys() == inside.keys()
    assert all(torch.equal(after[name], inside[name]) for name in after)


@pytest.mark.parametrize("head", ["linear", "tied"])
def test_a_gradient_is_gone_before_the_next_comes(head: str, folder: Path) -> None:
    bench = Bench(folder, steps=2, update="in_backward", optimizer=ADAFACTOR, model={"head": head})
    alive = []
    step = bench.trainer.optimizers.step_one

    def count(parameter: torch.Tensor) -> None:
        alive.append(sum(p.grad is not None for p in bench.model.parameters()))
        step(parameter)

    bench.trainer.optimizers.step_one = count  # type: ignore[method-assign]
    bench.fit()
    # one update of every parameter in each of the two steps, a tied one once
    assert alive == [1] * (2 * len(list(bench.model.parameters())))


def test_the_norm_is_global_and_clipping_by_parameter(folder: Path) -> None:
    plain = Bench(folder, steps=1, optimizer=ADAFACTOR, clip_grad_norm=NEVER)
    plain.fit()
    bench = Bench(folder, steps=1, optimizer=ADAFACTOR, clip_grad_norm=0.01, update="in_backward")
    norms = []
    step = bench.trainer.optimizers.step_one

    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norms.append(float(parameter.grad.norm()))
        step(parameter)

    bench.trainer.optimizers.step_one = note  # type: ignore[method-assign]
    bench.fit()
    assert bench.trainer.at.grad_norm == pytest.approx(plain.trainer.at.grad_norm, rel=1e-4)
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_a_bad_gradient_ends_the_run_and_leaves_the_checkpoint(folder: Path) -> None:
    bench = Bench(
        folder,
        model_class=Poisoned,
        steps=20,
        save_every=2,
        update="in_backward",
        optimizer=ADAFACTOR,
    )
    assert isinstance(bench.model, Poisoned)
    bench.model.poison, bench.model.gradient_only = 0.0, True
    bench.trainer.start()
    with pytest.raises(DivergedError, match=r"gradient of head\.weight is not finite") as caught:
        bench.trainer.fit(20)
    assert caught.value.exit_code == 6
    assert "the checkpoint of step 4 is intact" in str(caught.value)
    assert "nothing was updated" not in str(caught.value)
    assert list_checkpoints(bench.run.checkpoints)[0][0] == 4
    assert all(bool(tensor.isfinite().all()) for tensor in bench.newest().values())


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_resume_is_exact(weights: str, folder: Path, cache: Path) -> None:
    settings = {"optimizer": ADAFACTOR, "update": "in_backward", "weights": weights}
    whole = small.train(small.recipe(folder, runs="whole", **settings), cache=cache)
    parts = small.recipe(folder, runs="parts", **settings)
    small.train(parts, cache=cache)
    for step, path in list_checkpoints(folder / "parts" / "small" / "checkpoints"):
        if step > 3:
            import shutil

            shutil.rmtree(path)
    resumed = small.train(parts, cache=cache, resume=True)
    one, other = small.weights(whole.run), small.weights(resumed.run)
    assert one["head.weight"].dtype == (torch.bfloat16 if weights == "bf16" else torch.float32)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("grad_accum_steps", "2", "can't be accumulated"),
        ("optimizer", "{type: muon}", "use optimizer adafactor"),
    ],
)
def test_what_does_not_go_together_is_said(key: str, value: str, line: str) -> None:
    from valkyrie_core import Recipe
    from valkyrie_core.errors import RecipeError

    with pytest.raises(RecipeError, match=line):
        Recipe.load("tiny/small_memory", [f"train.{key}={value}"])


def test_a_trainer_updates_after_the_backward_pass_unless_asked(folder: Path) -> None:
    assert isinstance(Bench(folder).trainer._update, StepAfterBackward)
    assert isinstance(Bench(folder, update="in_backward").trainer._update, StepInBackward)
