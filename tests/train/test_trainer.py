from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.train import small
from valkyrie_core.data.batch import Batch
from valkyrie_core.errors import DivergedError, ResourceError
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.train import journal, trainer
from valkyrie_core.train.checkpoint import list_checkpoints, verify
from valkyrie_core.train.progress import Meter, StepEvent, Validation
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.schedule import LRPlan
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.trainer import Tools, Trainer


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "draw_curves", lambda rows, title: b"")


def uneven_batch(step: int) -> Batch:
    """Four rows of which each has another number of scored targets, one of them none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(5, 261, (4, 17), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, scored in enumerate((16, 3, 0, 9 - 4 * (step % 2))):
        targets[row, scored:] = -100
    return Batch(tokens[:, :-1], targets, torch.arange(4)[:, None].expand(4, 16))


class Bench:
    """A trainer on its own, with what it calls under the test's control."""

    def __init__(
        self,
        folder: Path,
        *,
        model_class: type[HybridLM] = HybridLM,
        evaluate: Callable[..., Validation | None] = lambda model, poll: None,
        **settings: Any,
    ) -> None:
        self.recipe = small.recipe(folder, **settings)
        self.run = RunDir(folder / f"run{len(list(folder.iterdir()))}")
        self.run.create()
        torch.manual_seed(0)
        self.model = model_class(self.recipe.model)
        self.events: list[StepEvent] = []
        self.stop = StopSignal()
        train = self.recipe.train
        self.trainer = Trainer(
            train,
            model=self.model,
            run=self.run,
            plan=LRPlan(train.schedule, train.steps),
            tools=Tools(uneven_batch, evaluate, lambda *_: "", self.events.append),
            stop=self.stop,
            device=torch.device("cpu"),
            precision="fp32",
            peak_flops=1e9,
        )

    def fit(self) -> None:
        self.trainer.start()
        self.trainer.fit(self.recipe.train.steps)

    def newest(self) -> dict[str, torch.Tensor]:
        return verify(list_checkpoints(self.run.checkpoints)[0][1]).model_tensors()


def one_step(folder: Path, accumulation: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients that the optimizer saw in the first step."""
    bench = Bench(folder, steps=1, grad_accum_steps=accumulation)
    seen: dict[str, torch.Tensor] = {}

    def step() -> None:
        for name, parameter in bench.model.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()

    bench.trainer.optimizers.step = step  # type: ignore[method-assign]
    bench.fit()
    assert bench.events[0].loss is not None
    return bench.events[0].loss, seen


def test_accumulation_is_the_mean_over_all_scored_tokens(folder: Path) -> None:
    """Equal weights for micro-batches would give every token of a short row more say."""
    bench = Bench(folder, steps=1)
    batch = uneven_batch(0)
    logits = bench.model(batch.tokens_BT, bench.model.init_state(4), batch.doc_BT).logits_BTV
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=-100)
    whole_loss, whole = one_step(folder, 1)
    assert whole_loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for accumulation in (2, 4):
        loss, gradients = one_step(folder, accumulation)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        assert gradients.keys() == whole.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped_to_the_norm(folder: Path) -> None:
    bench = Bench(folder, steps=1, clip_grad_norm=0.01)
    norms = []
    bench.trainer.optimizers.step = lambda: norms.append(  # type: ignore[method-assign]
        float(torch.nn.utils.get_total_norm(
            p.grad for p in bench.model.parameters() if p.grad is not None
        ))
    )  # fmt: skip
    bench.fit()
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert bench.trainer.at.grad_norm > 1  # what is reported is the norm before clipping


class Poisoned(HybridLM):
    """Gives a loss that is not finite, or a gradient that is not, in one call."""

    poison: float = math.nan
    gradient_only: bool = False
    calls_before: int = 5

    def loss(self, *arguments: Any, **keywords: Any) -> Any:
        loss, state, aux = super().loss(*arguments, **keywords)
        self.calls_before -= 1
        if self.calls_before >= 0:
            return loss, state, aux
        if self.gradient_only:
            # a huge slope at zero: the loss stays, the gradient of one weight does not
            weight = self.head.weight.flatten()[:1]
            return loss + (weight * 0 + 0.0).abs().sqrt().sum() * 1.0, state, aux
        return loss * self.poison, state, aux


@pytest.mark.parametrize(
    ("poison", "gradient_only"), [(math.nan, False), (math.inf, False), (0.0, True)]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_is_caught_before_anything_is_updated(
    poison: float, gradient_only: bool, accumulation: int, folder: Path
) -> None:
    bench = Bench(
        folder,
        model_class=Poisoned,
        steps=20,
        save_every=2,
        optimizer=small.MUON,
        grad_accum_steps=accumulation,
    )
    assert isinstance(bench.model, Poisoned)
    bench.model.poison, bench.model.gradient_only = poison, gradient_only
    bench.trainer.start()
    states: list[dict[str, torch.Tensor]] = []

    def everything() -> dict[str, torch.Tensor]:
        tensors = dict(bench.model.named_parameters()) | bench.trainer.optimizers.state_tensors()
        return {name: t.detach().clone() for name, t in tensors.items()}

    bench.trainer.tools = bench.trainer.tools._replace(
        progress=lambda _event: states.append(everything())
    )
    good_steps = 5 // accumulation
    with pytest.raises(DivergedError) as caught:
        bench.trainer.fit(20)
    assert caught.value.exit_code == 6
    assert f"after step {good_steps}:" in str(caught.value)
    saved = good_steps // 2 * 2
    assert f"the checkpoint of step {saved} is intact" in str(caught.value)
    if gradient_only:
        assert "the gradients of head.weight are not finite" in str(caught.value)
    now = everything()
    assert len(states) == good_steps
    assert all(torch.equal(now[name], states[-1][name]) for name in now)
    assert all(parameter.grad is None for parameter in bench.model.parameters())
    assert list_checkpoints(bench.run.checkpoints)[0][0] == saved
    assert all(bool(tensor.isfinite().all()) for tensor in bench.newest().values())


@pytest.mark.parametrize("optimizer", [{"type": "adamw", "lr": 1e20}, {"type": "muon", "lr": 1e20}])
def test_an_absurd_rate_ends_with_an_error_and_not_with_absurd_weights(
    optimizer: dict[str, Any], folder: Path
) -> None:
    bench = Bench(folder, steps=100, save_every=1, optimizer=optimizer)
    with pytest.raises(DivergedError) as caught:
        bench.fit()
    assert caught.value.exit_code == 6
    assert "train.optimizer.lr" in str(caught.value.hint)
    for _, path in list_checkpoints(bench.run.checkpoints):
        assert all(bool(t.isfinite().all()) for t in verify(path).model_tensors().values())


def test_weights_that_are_not_finite_are_never_saved(folder: Path) -> None:
    bench = Bench(folder, steps=4, save_every=1)

    def poison(event: StepEvent) -> None:
        if event.step == 2:
            with torch.no_grad():
                bench.model.head.weight[3, 4] = math.inf

    bench.trainer.tools = bench.trainer.tools._replace(progress=poison)
    with pytest.raises(DivergedError, match=r"head\.weight are not finite.* step 1 is intact"):
        bench.fit()
    assert list_checkpoints(bench.run.checkpoints)[0][0] == 1


def test_a_row_holds_the_mean_over_the_tokens_since_the_last(folder: Path) -> None:
    bench = Bench(folder, steps=4, log_every=2)
    bench.fit()
    losses = [event.loss or 0.0 for event in bench.events]
    scored = [int((uneven_batch(step).targets_BT != -100).sum()) for step in range(4)]
    assert scored[0] != scored[1]
    rows = [row for row in small.rows(bench.run) if row["kind"] == "train"]
    for row, first in zip(rows, (0, 2), strict=True):
        pair = slice(first, first + 2)
        total = sum(a * b for a, b in zip(losses[pair], scored[pair], strict=True))
        assert row["loss"] == pytest.approx(total / sum(scored[pair]), rel=1e-12)


def test_a_validation_that_is_not_finite_is_divergence(folder: Path) -> None:
    bench = Bench(folder, evaluate=lambda model, poll: Validation(math.nan, {"a": math.nan}))
    with pytest.raises(DivergedError, match="the validation is nan"):
        bench.fit()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_shortages_are_told_as_such(error: Exception, folder: Path) -> None:
    class Short(HybridLM):
        def loss(self, *arguments: Any, **keywords: Any) -> Any:
            raise error

    with pytest.raises(ResourceError) as caught:
        Bench(folder, model_class=Short).fit()
    assert caught.value.exit_code == 7
    assert caught.value.hint


def test_a_bug_stays_a_bug(folder: Path) -> None:
    class Broken(HybridLM):
        def loss(self, *arguments: Any, **keywords: Any) -> Any:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Bench(folder, model_class=Broken).fit()


class Stopping(HybridLM):
    """Asks to stop in one call of the loss."""

    stop_at = 0
    calls = 0
    ask: Callable[[str], None]

    def loss(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            self.ask("SIGTERM")
        return super().loss(*arguments, **keywords)


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_a_stop_is_seen_at_every_micro_batch(stop_at: int, folder: Path) -> None:
    bench = Bench(folder, model_class=Stopping, steps=3, grad_accum_steps=4)
    assert isinstance(bench.model, Stopping)
    bench.model.stop_at, bench.model.ask = stop_at, bench.stop.request
    with pytest.raises(StopRequestedError):
        bench.fit()
    assert bench.model.calls == stop_at
    # the step under way is given up, unless its last micro-batch was the one
    assert list_checkpoints(bench.run.checkpoints)[0][0] == stop_at // 4


def test_a_run_that_can_not_be_read_back_never_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(folder)
    original = trainer.Saver.save

    def damage(self: Any, position: Any, carried: Any) -> None:
        original(self, position, carried)
        (bench.run.checkpoints / "step-000000" / "meta.json").write_bytes(b"{}")

    monkeypatch.setattr(trainer.Saver, "save", damage)
    with pytest.raises(Exception, match=r"meta\.json"):
        bench.trainer.start()


def test_a_small_disk_is_announced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    Bench(folder).trainer.start()
    assert "checkpoints will take up to" in caplog.text


def test_progress_tells_speed_after_the_first_step(folder: Path) -> None:
    bench = Bench(folder, steps=4)
    bench.fit()
    steps = [event for event in bench.events if event.validation is None]
    assert [event.step for event in steps][:4] == [1, 2, 3, 4]
    assert steps[0].tokens_per_second is None
    assert steps[1].tokens_per_second is not None
    assert steps[3].eta_seconds == 0
    assert steps[1].lr == pytest.approx(1e-3)
    assert all(event.steps == 4 for event in steps)


def test_the_meter_leaves_out_the_first_step() -> None:
    meter = Meter(peak_flops=1e6)
    meter.add(100, 600_000, 50.0)
    assert meter.tokens_per_second is None
    assert meter.mfu is None
    assert meter.seconds_for(3) is None
    for _ in range(60):
        meter.add(100, 600_000, 2.0)
    assert meter.tokens_per_second == 50
    assert meter.mfu == pytest.approx(50 * 6_000 / 1e6)
    assert meter.sitting_tokens_per_second == 50
    assert meter.seconds_for(3) == 6
    unknown = Meter(peak_flops=None)
    for _ in range(2):
        unknown.add(1, 1, 1.0)
    assert unknown.mfu is None


def test_flops_of_a_step_are_three_times_forward(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    monkeypatch.setattr(Meter, "add", lambda _self, *parts: counted.append(parts[:2]))
    bench = Bench(folder, steps=2)
    bench.fit()
    forward = sum(bench.model.flops_per_token(16).values())
    assert counted == [(64, 3 * 64 * forward)] * 2


def test_the_best_validation_is_kept_and_every_step_counts(folder: Path) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.0, 2.75, 2.6])
    bench = Bench(
        folder,
        steps=6,
        eval_every=1,
        evaluate=lambda model, poll: Validation(next(scores), {"a": 0.0}),
    )
    bench.fit()
    # the newest two and the best; of two equal ones the earlier
    assert [step for step, _ in list_checkpoints(bench.run.checkpoints)] == [6, 5, 2]
    assert (bench.trainer.at.best_step, bench.trainer.at.best_bpb) == (2, 2.0)


def test_a_better_validation_between_saves_is_saved(folder: Path) -> None:
    scores = iter([3.0, 2.0, 2.5])
    bench = Bench(
        folder,
        steps=3,
        eval_every=1,
        save_every=3,
        evaluate=lambda model, poll: Validation(next(scores), {"a": 0.0}),
    )
    bench.fit()
    assert [step for step, _ in list_checkpoints(bench.run.checkpoints)] == [3, 2]


def test_compiling_uses_static_shapes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(function: Any, **keywords: Any) -> Any:
        seen.append(keywords)
        return function

    monkeypatch.setattr(torch, "compile", fake)
    Bench(folder, steps=1, compile={"mode": "default"}).fit()
    assert seen == [{"dynamic": False, "mode": "default"}]
    Bench(folder, steps=1).fit()
    assert len(seen) == 1


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(folder: Path) -> None:
    losses = []
    for settings in ({}, {"compile": {}}):
        bench = Bench(folder, steps=3, **settings)
        bench.fit()
        losses.append([event.loss for event in bench.events if event.validation is None])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
