"""What training tells routers: loads of whole steps, biases, and experts that come back."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import small
from tests.train.test_resume import outcome, stopped_after
from tests.train.test_trainer import Bench
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.train import journal
from valkyrie_core.train.checkpoint import list_checkpoints, verify
from valkyrie_core.train.progress import Position
from valkyrie_core.train.routing import max_vio, num_dead
from valkyrie_core.train.signals import StopRequestedError

EXPERTS: dict[str, Any] = {
    "type": "moe",
    "num_experts": 4,
    "expert": {"type": "mlp", "hidden_dim": 8},
    "balance": [{"type": "bias", "rate": 0.01}, {"type": "aux"}],
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "draw_curves", lambda rows, title: b"")


def model(**ffn: Any) -> dict[str, Any]:
    """A recurrent layer and one of attention, both with experts."""
    blocks = {name: {**block, "ffn": EXPERTS | ffn} for name, block in small.BLOCKS.items()}
    return {"core": {"type": "stack", "blocks": blocks, "pattern": ["rwkv", "attn"]}}


def layers(bench: Bench) -> list[MoE]:
    return [layer.ffn for layer in bench.model.core.layers]


@pytest.mark.parametrize(("warmup_steps", "scale"), [(0, 1.0), (4, 0.25)])
def test_a_bias_moves_against_the_load_of_the_step_before(
    folder: Path, warmup_steps: int, scale: float
) -> None:
    schedule = {"type": "cosine", "warmup_steps": warmup_steps}
    bench = Bench(folder, steps=4, model=model(), schedule=schedule)
    bench.trainer.start()
    bench.trainer.fit(1)
    for index, moe in enumerate(layers(bench)):
        load_E = torch.tensor(bench.trainer.routing.loads[index], dtype=torch.float64)
        # no padding there: four rows of 16 tokens, two experts each
        assert load_E.sum() == 2 * 64
        # its rate follows that of the weights
        expected_E = scale * 0.01 * (load_E.mean() - load_E).sign()
        torch.testing.assert_close(moe.routers[0].bias_E.double(), expected_E)
        assert expected_E.abs().sum() > 0


@pytest.mark.parametrize("changes", [{"grad_accum_steps": 4}, {"activation_checkpointing": True}])
def test_loads_are_those_of_the_whole_step_once(folder: Path, changes: dict[str, Any]) -> None:
    plain = Bench(folder, steps=1, model=model())
    plain.fit()
    other = Bench(folder, steps=1, model=model(), **changes)
    other.fit()
    assert other.trainer.routing.loads == plain.trainer.routing.loads
    for ours, theirs in zip(layers(other), layers(plain), strict=True):
        assert torch.equal(ours.routers[0].bias_E, theirs.routers[0].bias_E)


def test_the_loss_that_is_told_is_the_text_s_alone(folder: Path) -> None:
    bench = Bench(folder, steps=1, model=model(balance=[{"type": "aux", "coefficient": 5.0}]))
    bare = Bench(folder, steps=1, model=model(balance=[]))
    bench.fit()
    bare.fit()
    assert bench.events[0].loss == pytest.approx(bare.events[0].loss, rel=1e-6)
    assert bench.trainer.routing.losses["aux"] > 9
    assert not bare.trainer.routing.losses


def starving(bench: Bench, expert: int) -> MoE:
    """The first layer, whose expert is never chosen."""
    moe = layers(bench)[0]
    moe.routers[0].bias_E[expert] = -1e6
    return moe


REVIVE = {"revive": {"window": 3, "cooldown": 5, "noise": 0.05}, "balance": []}


def test_an_expert_without_work_becomes_a_noisy_copy_of_the_busiest(folder: Path) -> None:
    bench = Bench(folder, steps=4, model=model(**REVIVE), log_every=1, optimizer=small.MUON)
    moe = starving(bench, 2)
    bench.trainer.start()
    bench.trainer.fit(2)
    assert moe.starved_E[2] == 2
    before = {name: p.detach().clone() for name, p in moe.experts.named_parameters()}
    bench.trainer.fit(3)
    load = bench.trainer.routing.loads[0]
    busiest = load.index(max(load))
    assert load[2] == 0
    assert moe.starved_E[2] == -5
    assert moe.routers[0].bias_E[2] == 0
    for name, parameter in moe.experts.named_parameters():
        copy, source = parameter[2].detach(), parameter[busiest].detach()
        assert not torch.equal(copy, before[name][2])
        assert 0 < (copy - source).std() < 0.1 * source.std() + 1e-3, name
    row = moe.routers[0].weight_ED[2].detach() - moe.routers[0].weight_ED[busiest].detach()
    assert 0 < row.norm() < 0.2 * moe.routers[0].weight_ED[busiest].norm()
    state = bench.trainer.optimizers.state_tensors()
    name = "core.layers.0.ffn.experts.up_EHD/momentum_buffer"
    assert not state[name][2].any()
    assert state[name][busiest].any()
    assert not state["core.layers.0.ffn.routers.0.weight_ED/exp_avg"][2].any()
    rows = [row for row in small.rows(bench.run) if row["kind"] == "train"]
    assert [row["revived"] for row in rows] == [[], [], [[0, 2, busiest]]]
    bench.trainer.fit(4)
    assert bench.trainer.routing.loads[0][2] > 0
    assert moe.starved_E[2] == -4


def test_a_gate_s_noise_is_copied_too(folder: Path) -> None:
    gate = {"type": "noisy_topk", "top_k": 2}
    bench = Bench(folder, steps=3, model=model(**REVIVE, gate=gate), optimizer=small.MUON)
    moe = starving(bench, 2)
    bench.fit()
    load = bench.trainer.routing.loads[0]
    noise_ED = moe.routers[0].gate.noise_ED.detach()
    difference_D = noise_ED[2] - noise_ED[load.index(max(load))]
    assert 0 < difference_D.norm() < noise_ED[load.index(max(load))].norm()
    state = bench.trainer.optimizers.state_tensors()
    moments_ED = state["core.layers.0.ffn.routers.0.gate.noise_ED/exp_avg"]
    assert not moments_ED[2].any()
    assert moments_ED.any()


def test_without_the_key_nothing_comes_back(folder: Path) -> None:
    bench = Bench(folder, steps=6, model=model(balance=[]))
    starving(bench, 2)
    bench.fit()
    assert bench.trainer.routing.loads[0][2] == 0
    assert not any("starved_E" in name for name, _ in bench.model.named_buffers())


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_adafactor_forgets_a_revived_expert(folder: Path, weights: str) -> None:
    bench = Bench(
        folder,
        steps=3,
        model=model(**REVIVE),
        optimizer={"type": "adafactor"},
        weights=weights,
    )
    moe = starving(bench, 1)
    bench.fit()
    assert moe.starved_E[1] == -5
    state = bench.trainer.optimizers.state_tensors()
    assert not state["core.layers.0.ffn.experts.up_EHD/row_var"][1].any()


@pytest.mark.parametrize("gate", ["noisy_topk", "top_p", "switch"])
def test_experts_resume_to_the_bit(gate: str, folder: Path, cache: Path) -> None:
    """Biases, counters, cool-downs and the noise of gates and of revived experts."""
    ffn = {
        "gate": {"type": gate},
        # nobody has a tenth more than the others, so that experts come back all the time
        "revive": {"window": 2, "cooldown": 1, "share": 0.9},
    }
    settings: dict[str, Any] = {"model": model(**ffn), "steps": 7, "optimizer": small.MUON}
    whole = small.train(small.recipe(folder, runs="whole", **settings), cache=cache)
    rows = small.rows(whole.run)
    assert sum(len(row.get("revived", [])) for row in rows) > 3
    expected = outcome(whole.run)
    for k in range(1, 7):
        recipe = small.recipe(folder, runs=f"stopped{k}", **settings)
        stopped_after(recipe, k, cache)
        assert outcome(small.train(recipe, cache=cache, resume=True).run) == expected, k


def test_a_stop_in_the_middle_of_a_step_moves_nothing(folder: Path) -> None:
    bench = Bench(folder, steps=3, model=model(), grad_accum_steps=4)
    bench.trainer.start()
    bench.trainer.fit(1)
    before = [moe.routers[0].bias_E.clone() for moe in layers(bench)]
    calls = 0
    poll = bench.stop.poll

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        poll()

    running = bench.trainer.objective._running  # type: ignore[attr-defined]
    bench.trainer.objective._running = running._replace(poll=stop)  # type: ignore[attr-defined]
    with bench.stop, pytest.raises(StopRequestedError):
        bench.trainer.fit(2)
    for moe, bias_E in zip(layers(bench), before, strict=True):
        assert torch.equal(moe.routers[0].bias_E, bias_E)


def test_checkpoints_of_before_experts_were_counted_go_on() -> None:
    meta = Position(step=3).to_meta()
    del meta["revived"]
    assert Position.from_meta(json.loads(json.dumps(meta))) == Position(step=3)


def test_a_checkpoint_holds_biases_and_counters(folder: Path) -> None:
    bench = Bench(folder, steps=2, model=model(**REVIVE))
    bench.fit()
    tensors = verify(list_checkpoints(bench.run.checkpoints)[0][1]).model_tensors()
    assert tensors["core.layers.1.ffn.routers.0.bias_E"].shape == (4,)
    assert tensors["core.layers.1.ffn.starved_E"].dtype == torch.int64


def test_evenness_by_hand() -> None:
    load_E = torch.tensor([30.0, 10.0, 0.0, 0.9])
    assert max_vio(load_E) == pytest.approx(30 / (40.9 / 4) - 1)
    assert num_dead(load_E) == 2
    assert max_vio(torch.zeros(3)) == 0
    assert max_vio(torch.ones(3)) == 0


@pytest.mark.slow
def test_a_compiled_training_has_experts_too(folder: Path) -> None:
    plain = Bench(folder, steps=3, model=model())
    compiled = Bench(folder, steps=3, model=model(), compile={})
    plain.fit()
    compiled.fit()
    losses = [[event.loss for event in bench.events] for bench in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert plain.trainer.routing.loads == compiled.trainer.routing.loads
