"""States that go on from step to step, contexts that grow, activations that are computed again."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.nn.menu import CONFIGS, VOCAB, awake
from tests.train import small
from valkyrie_core.data.batch import Batch
from valkyrie_core.errors import CheckpointError, RecipeError, UsageError
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import LMState
from valkyrie_core.nn.state_tensors import state_tensors
from valkyrie_core.recipe import Recipe
from valkyrie_core.train import carry, journal
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.next_token import NextToken
from valkyrie_core.train.progress import Position
from valkyrie_core.train.stages import stage_at, stages, trained_context

PASSING: dict[str, Any] = {"state_passing": {"span": 64}}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "draw_curves", lambda rows, title: b"")


def tokens(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_carried_states_give_the_losses_of_the_whole(name: str) -> None:
    """Chunks in training mode, documents ending in the middle, states through a file in between."""
    # some gates draw noise in training
    model = awake(CONFIGS[name]).train(not name.endswith(("moe-noisy", "moe-switch")))
    read_BT, targets_BT = tokens(2, 36), tokens(2, 36, seed=2)
    doc_BT = torch.zeros(2, 36, dtype=torch.int64)
    doc_BT[0, 14:] = 1  # inside the second chunk
    doc_BT[1, 18:] = 7  # between two chunks
    whole, _ = model.token_losses(read_BT, targets_BT, model.init_state(2), doc_BT)
    state, pieces = model.init_state(2), []
    for start in range(0, 36, 9):
        window = slice(start, start + 9)
        losses, after = model.token_losses(
            read_BT[:, window], targets_BT[:, window], state, doc_BT[:, window]
        )
        pieces.append(losses)
        stored = carry.to_tensors([carry.carried(after)])
        assert not any(tensor.requires_grad for tensor in stored.values())
        (state,) = carry.from_tensors(model, 2, 1, stored)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_keys_of_ended_documents_are_not_carried() -> None:
    model = awake(CONFIGS["hybrid"]).train()
    doc_BT = torch.zeros(2, 12, dtype=torch.int64)
    doc_BT[0, 5:], doc_BT[1, 8:] = 1, 1
    _, state = model.token_losses(tokens(2, 12), tokens(2, 12), model.init_state(2), doc_BT)
    cache = next(
        part for layer in carry.carried(state).layers for part in layer if isinstance(part, KVState)
    )
    assert cache.length == 7  # the longest of the two documents that go on
    assert len(cache.k_BKSH[0, 0]) == 7


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "length", "type"])
def test_a_carried_state_that_does_not_fit_is_told(change: str) -> None:
    model = awake(CONFIGS["hybrid"])
    _, state = model.token_losses(tokens(1, 3), tokens(1, 3), model.init_state(1))
    stored = carry.to_tensors([state])
    name = {"shape": "0/layers/0/0/wkv_BNHH", "type": "0/doc_B"}.get(change, "0/layers/2/0/v_BKSH")
    if change == "missing":
        del stored[name]
    elif change == "extra":
        stored["0/more"] = torch.zeros(1)
    elif change == "shape":
        stored[name] = stored[name][:, :1]
    elif change == "length":
        stored[name] = stored[name][:, :, :2]
    else:
        stored[name] = stored[name].float()
    with pytest.raises(CheckpointError, match="the carried state of micro-batch 0: "):
        carry.from_tensors(model, 1, 1, stored)


def test_a_training_hands_states_on(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step begins with is what the last one ended with."""
    entered: list[tuple[Batch, LMState | None]] = []
    original = NextToken._backward

    def watched(self: NextToken, micro: Batch, num_scored: int, state: LMState | None) -> Any:
        entered.append((micro, state))
        return original(self, micro, num_scored, state)

    monkeypatch.setattr(NextToken, "_backward", watched)
    small.train(small.recipe(folder, steps=6, **PASSING), cache=cache)
    assert entered[0][1] is None
    for (before, _), (after, state) in itertools.pairwise(entered):
        assert state is not None
        assert not any(t.requires_grad for t in state_tensors(state).values())
        assert torch.equal(state.doc_B, before.doc_BT[:, -1])
        # rows begin their stretches at different steps: some go on at every step
        assert bool((after.doc_BT[:, 0] == state.doc_B).any())


def test_a_new_context_resets_and_is_announced(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    schedule = [
        {"from_fraction": 0.5, "context_len": 32},
        {"from_fraction": 0.7, "context_len": 64},
    ]
    result = small.train(
        small.recipe(folder, steps=10, context_schedule=schedule, **PASSING), cache=cache
    )
    assert "step 5: from here on contexts of 32 tokens, 2 to a step; the carried" in caplog.text
    assert "step 7: from here on contexts of 64 tokens, 1 to a step; the carried" in caplog.text
    assert result.tokens_seen == 10 * 64


def config(**train: Any) -> SupervisedConfig:
    return SupervisedConfig.model_validate(
        {"steps": 10, "batch_size": 8, "context_len": 16, **train}
    )


def test_stages_keep_the_tokens_of_a_step() -> None:
    schedule = [
        {"from_fraction": 0.25, "context_len": 32},
        {"from_fraction": 0.9, "context_len": 128},
    ]
    found = stages(config(context_schedule=schedule, grad_accum_steps=4))
    assert [tuple(stage)[1:] for stage in found] == [(0, 16, 8, 2), (3, 32, 4, 1), (9, 128, 1, 1)]
    assert [stage_at(step, found).number for step in (0, 2, 3, 8, 9, 500)] == [0, 0, 1, 1, 2, 2]


def test_stages_of_a_short_run_leave_the_later_of_two() -> None:
    schedule = [
        {"from_fraction": 0.5, "context_len": 32},
        {"from_fraction": 0.6, "context_len": 64},
    ]
    found = stages(config(steps=1, context_schedule=schedule))
    assert [(stage.first_step, stage.context_len) for stage in found] == [(0, 16), (1, 64)]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"context_schedule": [{"from_fraction": 0.5, "context_len": 48}]},
            "must divide the 128",
        ),
        (
            {
                "context_schedule": [
                    {"from_fraction": 0.5, "context_len": 32},
                    {"from_fraction": 0.5, "context_len": 64},
                ]
            },
            "0.5 is not after 0.5",
        ),
        ({"context_schedule": [{"from_fraction": 0.5, "context_len": 8}]}, "contexts grow"),
        ({"context_schedule": [{"from_fraction": 0.5, "context_len": 16}]}, "contexts grow"),
        ({"state_passing": {"span": 40}}, "multiple of the context length 16"),
        (
            {
                "state_passing": {"span": 48},
                "context_schedule": [{"from_fraction": 0.5, "context_len": 32}],
            },
            "multiple of the context length 32",
        ),
        ({"context_schedule": [{"from_fraction": 1.0, "context_len": 32}]}, "less than 1"),
    ],
)
def test_stages_that_do_not_fit_are_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**train)


def test_a_mistake_in_a_stage_is_located(folder: Path) -> None:
    text = small.recipe(folder).to_json()
    path = folder / "r.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, ["train.context_schedule=[{from_fraction: 0.5, context_len: 48}]"])
    assert "train.context_schedule.0.context_len" in str(caught.value)


def test_compiling_and_growing_caches_do_not_go_together(folder: Path) -> None:
    settings = {**PASSING, "compile": {}}
    with pytest.raises(ValidationError, match="leave one of the two out"):
        small.recipe(folder, **settings)
    only_rwkv = {
        "core": {"type": "stack", "blocks": {"rwkv": small.BLOCKS["rwkv"]}, "pattern": ["rwkv"]}
    }
    assert small.recipe(folder, model=only_rwkv, **settings).train.compile is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_that_are_computed_again_change_no_bit(
    precision: str, folder: Path, cache: Path
) -> None:
    digests = set()
    for again in (False, True):
        recipe = small.recipe(
            folder,
            runs=f"runs-{again}",
            steps=4,
            precision=precision,
            activation_checkpointing=again,
            optimizer=small.MUON,
            **PASSING,
        )
        run = small.train(recipe, cache=cache).run
        digests.add(small.digest(run))
    assert len(digests) == 1


def test_activations_are_not_kept() -> None:
    """Bytes that the backward pass holds on to, counted as autograd saves them."""
    model = HybridLM(CONFIGS["hybrid"]).train()
    read_BT = tokens(2, 200)
    held = {}
    for again in (False, True):
        model.core.recomputes = again
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(read_BT, read_BT, model.init_state(2))
        held[again] = saved
    assert held[True] < held[False] / 3


def test_what_was_trained_depends_on_the_step() -> None:
    schedule = [
        {"from_fraction": 0.3, "context_len": 32},
        {"from_fraction": 0.6, "context_len": 64},
    ]
    found = [
        trained_context(config(context_schedule=schedule), step) for step in (0, 3, 4, 6, 7, 10)
    ]
    assert found == [16, 16, 32, 32, 64, 64]


def test_a_span_longer_than_all_text_is_refused(folder: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match=r"span \(1,024,000\) is longer than every corpus: plays"):
        small.train(small.recipe(folder, state_passing={"span": 1_024_000}), cache=cache)


def test_steps_without_a_target_do_not_count() -> None:
    at = Position()
    at.advance(2.0, 10, 16, 1.0, 1.0, 0.1)
    at.advance(0.0, 0, 16, 0.0, 1.0, 0.1)
    assert at.loss == 2.0
    assert at.take_mean_loss() == 2.0
    at.advance(0.0, 0, 16, 0.0, 1.0, 0.1)
    assert at.take_mean_loss() == 2.0
