"""States in fewer bits are smaller, close, and can be gone on from."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tests.nn.menu import VOCAB, awake, hybrid_config, model_config
from valkyrie_core.evaluate.long_context import state_bytes
from valkyrie_core.infer.engine import Engine
from valkyrie_core.nn.state import map_tensors, num_bytes
from valkyrie_core.nn.state_format import StateFormat, limit_windows, pack, unpack

TOKENS = torch.randint(0, VOCAB, (2, 300), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("format", "smaller"),
    [
        (StateFormat(kv_dtype="int8"), 0.8),
        (StateFormat(state_dtype="bf16"), 1.0),
        (StateFormat(state_dtype="int8"), 1.0),
        (StateFormat(kv_dtype="int8", state_dtype="int8"), 0.8),
    ],
)
def test_a_packed_state_is_smaller_and_goes_on_nearly_as_before(
    format: StateFormat, smaller: float
) -> None:
    model = awake(hybrid_config()).float().eval()
    with torch.no_grad():
        state = model(TOKENS, model.init_state(2)).state
        packed = pack(state, format)
        assert num_bytes(packed) < smaller * num_bytes(state)
        back = unpack(packed)
        exact = model(TOKENS[:, :5], state).logits_BTV
        near = model(TOKENS[:, :5], back).logits_BTV
        assert not torch.equal(near, exact)
        assert float((near - exact).abs().max()) < 0.1 * float(exact.abs().max())
        # packing is a value as well, and once is enough
        assert torch.equal(model(TOKENS[:, :5], unpack(packed)).logits_BTV, near)
        assert torch.equal(model(TOKENS[:, :5], unpack(pack(back, format))).logits_BTV, near)


def test_as_computed_is_the_state_itself() -> None:
    model = awake(hybrid_config()).float().eval()
    state = model(TOKENS, model.init_state(2)).state
    assert pack(state, StateFormat()) is state
    assert StateFormat().changes_nothing
    assert not StateFormat(kv_window=3).changes_nothing


def test_states_of_zeros_stay_zeros() -> None:
    model = awake(hybrid_config()).float().eval()
    format = StateFormat(kv_dtype="int8", state_dtype="int8")
    empty = model.init_state(1)
    with torch.no_grad():
        exact = model(TOKENS[:1], empty).logits_BTV
        assert torch.equal(model(TOKENS[:1], unpack(pack(empty, format))).logits_BTV, exact)


def test_windows_are_limited_and_the_model_is_that_of_the_window() -> None:
    wide = awake(model_config("attention")).float().eval()
    config = model_config("attention").model_dump()
    config["core"]["blocks"]["block"]["mixer"].update(window=7)
    narrow = awake(type(wide.config).model_validate(config)).float().eval()
    assert limit_windows(wide, 7) == 2
    assert limit_windows(wide, 9) == 0
    with torch.no_grad():
        ours = wide(TOKENS, wide.init_state(2)).logits_BTV
        assert torch.equal(ours, narrow(TOKENS, narrow.init_state(2)).logits_BTV)


def test_an_engine_keeps_states_in_its_format() -> None:
    model = awake(hybrid_config()).float().eval()
    format = StateFormat(kv_dtype="int8", state_dtype="int8")
    exact = Engine(model, chunk_len=50).prefill(TOKENS[:1], model.init_state(1))
    rounded = Engine(model, chunk_len=50, kept=format).prefill(TOKENS[:1], model.init_state(1))
    assert exact is not None
    assert rounded is not None
    assert not torch.equal(exact.logits_BV, rounded.logits_BV)
    difference = (exact.logits_BV - rounded.logits_BV).abs().max()
    assert float(difference) < 0.2 * float(exact.logits_BV.abs().max())


@pytest.mark.parametrize("mixer", ["hierarchical-strides", "structure-rounds", "attention-gqa"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_counts_are_not_rounded(mixer: str, dtype: Literal["bf16", "int8"]) -> None:
    model = awake(model_config(mixer)).float().eval()
    with torch.no_grad():
        # more tokens than bf16 can count
        state = model(TOKENS[:, :299], model.init_state(2)).state
        back = unpack(pack(state, StateFormat(state_dtype=dtype)))
    counts, same = list[torch.Tensor](), list[torch.Tensor]()
    for one, found in ((state, counts), (back, same)):
        map_tensors(lambda x, found=found: found.append(x) or x, one.layers)
    whole = [pair for pair in zip(counts, same, strict=True) if not pair[0].is_floating_point()]
    assert whole
    assert all(torch.equal(*pair) for pair in whole)


def test_caches_inside_of_mixers_are_caches() -> None:
    for mixer in ("structure", "routed-soft", "attention"):
        model = awake(model_config(mixer)).float().eval()
        sizes = []
        for length in (300, 1500):
            tokens = torch.randint(0, VOCAB, (1, length))
            with torch.no_grad():
                sizes.append(state_bytes(model(tokens, model.init_state(1)).state))
        (fixed, cached), (still, more) = sizes
        assert fixed == still, mixer
        assert cached < more, mixer
