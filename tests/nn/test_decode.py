from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.menu import CONFIGS, MOES, VOCAB, awake, model_config
from valkyrie_core.kernels import build
from valkyrie_core.kernels.decode import MAX_BATCH
from valkyrie_core.nn import decode
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import StackConfig
from valkyrie_core.nn.decode import Decoder, ModuleStep
from valkyrie_core.nn.decode_moe import has_step
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.rwkv import ChannelMix
from valkyrie_core.nn.state import LMState
from valkyrie_core.nn.weights import Weights, rounded


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Native code for one instruction set after the other."""
    monkeypatch.setenv("VALKYRIE_ISA", request.param)
    try:
        build.library("decode_rwkv")
        build.library("decode_layers")
        build.library("decode_moe")
    except build.BuildError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def odd_config(**changes: Any) -> ModelConfig:
    """Sizes that are no multiple of anything; heads of 12 and 20, a width that is not of 16."""
    blocks = {
        "r": {
            "mixer": {
                **{"type": "rwkv7", "head_dim": 12, "decay_rank": 5, "rate_rank": 7},
                "eigenvalues": "signed",
            },
            "ffn": {"type": "channel_mix", "hidden_dim": 37},
        },
        "a": {
            "mixer": {"type": "attention", "num_heads": 3, "num_kv_heads": 1},
            "ffn": {"type": "swiglu", "hidden_dim": 41},
        },
    }
    return ModelConfig.model_validate(
        {
            "vocab_size": VOCAB,
            "dim": 60,
            "core": {"type": "stack", "blocks": blocks, "pattern": ["a", "r", "r", "a"]},
            **changes,
        }
    )


BY_MODULES = ("sparsemax", "routed", "feedback", "hierarchical", "structure")
STACKS = {
    name: one
    for name, one in CONFIGS.items()
    # of these there is no native step
    if isinstance(one.core, StackConfig) and not any(word in name for word in BY_MODULES)
}
ALL = {**STACKS, "odd": odd_config(), "odd-rms": odd_config(norm="rms_norm")}
LOOPED = [name for name, one in CONFIGS.items() if not isinstance(one.core, StackConfig)]


def model_of(name: str) -> HybridLM:
    return awake(ALL[name]).float().eval()


def steps_of(decoder: Decoder) -> list[Any]:
    """All steps of a decoder that has decoded something."""
    assert decoder._steps is not None, "the model does not run in native steps at all"
    return [step for layer in decoder._steps.layers for step in layer]


def read_by_steps(decoder: Decoder, tokens_BT: Tensor, state: LMState) -> tuple[Tensor, LMState]:
    logits = []
    for t in range(tokens_BT.shape[1]):
        logits_BV, state = decoder.step(tokens_BT[:, t], state)
        logits.append(logits_BV)
    return torch.stack(logits, dim=1), state


def numbers(state: Any) -> list[Tensor]:
    """The tensors of a state, of a cache only what it holds."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, KVState):
        L = state.length
        return [state.k_BKSH[:, :, :L], state.v_BKSH[:, :, :L], state.segment_BS[:, :L]]
    return [tensor for item in state for tensor in numbers(item)]


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    ours, theirs = numbers(one), numbers(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        limit = tolerance * max(1.0, float(b.double().abs().max()))
        assert float((a.double() - b.double()).abs().max()) <= limit


@pytest.mark.parametrize("B", [1, 2, 3, 7, MAX_BATCH])
@pytest.mark.parametrize("name", ALL)
def test_fused_steps_equal_their_modules(isa: str, name: str, B: int) -> None:
    model = model_of(name)
    tokens_BT = tokens(B, 24, seed=B)
    expected = model(tokens_BT, model.init_state(B))
    decoder = Decoder(model)
    state = model(tokens_BT[:, :3], model.init_state(B)).state
    logits_BTV, state = read_by_steps(decoder, tokens_BT[:, 3:], state)
    modules = [step.mixer for step in steps_of(decoder) if isinstance(step, ModuleStep)]
    assert all(isinstance(mixer, MoE) and not has_step(mixer) for mixer in modules)
    without = [m for m in model.modules() if isinstance(m, MoE) and not has_step(m)]
    assert len(modules) == len(without)
    assert_same(logits_BTV, expected.logits_BTV[:, 3:], 1e-5)
    assert_same(state, expected.state, 1e-5)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("attention-sparsemax+swiglu", "Attention"),
        ("routed-soft+swiglu", "RoutedMixer"),
        ("hierarchical+channel_mix", "BandedRWKV7"),
        ("hierarchical-strides+swiglu", "StridedRWKV7"),
        ("structure+channel_mix", "Structure"),
        ("routed-hard+channel_mix", "RoutedMixer"),
    ],
)
def test_what_has_no_native_step_is_decoded_by_modules_and_said(
    name: str,
    module: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "_announced", set())
    model = awake(CONFIGS[name]).float().eval()
    decoder, tokens_BT = Decoder(model), tokens(2, 9)
    logits_BTV, _ = read_by_steps(decoder, tokens_BT, model.init_state(2))
    expected = model(tokens_BT, model.init_state(2)).logits_BTV
    torch.testing.assert_close(logits_BTV, expected, rtol=1e-4, atol=1e-4)
    assert f"no native step for this {module}" in caplog.text


@pytest.mark.parametrize("name", LOOPED)
def test_loops_decode_through_their_modules_and_say_so(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_announced", set())
    model = awake(CONFIGS[name]).float().eval()
    tokens_BT = tokens(2, 12)
    expected = model(tokens_BT, model.init_state(2))
    decoder = Decoder(model)
    state = model(tokens_BT[:, :3], model.init_state(2)).state
    logits_BTV, state = read_by_steps(decoder, tokens_BT[:, 3:], state)
    assert_same(logits_BTV, expected.logits_BTV[:, 3:], 1e-5)
    assert_same(state, expected.state, 1e-5)
    assert "no native steps for looped blocks" in caplog.text


@pytest.mark.parametrize("head_dim", [4, 8, 16, 20, 32, 64])
def test_every_width_of_a_head(isa: str, head_dim: int) -> None:
    config = odd_config().model_dump()
    config["dim"] = 2 * head_dim
    config["core"]["blocks"]["r"]["mixer"]["head_dim"] = head_dim
    config["core"]["blocks"]["a"]["mixer"] = {"type": "attention", "num_heads": 2}
    model = awake(ModelConfig.model_validate(config)).float().eval()
    # more keys than a vector has lanes; one step, so that rounding does not add up over many
    state = model(tokens(2, 40), model.init_state(2)).state
    expected = model(tokens(2, 1), state)
    decoder = Decoder(model)
    logits_BTV, state = read_by_steps(decoder, tokens(2, 1), state)
    assert not any(isinstance(step, ModuleStep) for step in steps_of(decoder))
    assert_same(logits_BTV, expected.logits_BTV, 1e-5)
    assert_same(state, expected.state, 1e-5)


@pytest.mark.parametrize("name", ["odd", "odd-rms", "hybrid", "tied"])
def test_modules_go_on_from_fused_steps(isa: str, name: str) -> None:
    model = model_of(name)
    tokens_BT = tokens(2, 20)
    expected = model(tokens_BT, model.init_state(2))
    _, state = read_by_steps(Decoder(model), tokens_BT[:, :9], model.init_state(2))
    after = model(tokens_BT[:, 9:], state)
    assert_same(after.logits_BTV, expected.logits_BTV[:, 9:], 1e-5)
    assert_same(after.state, expected.state, 1e-5)


@pytest.mark.parametrize("name", ["odd", "hybrid", "attention-gqa+swiglu"])
def test_old_states_stay_good(isa: str, name: str) -> None:
    model = model_of(name)
    decoder = Decoder(model)
    start = model(tokens(2, 5), model.init_state(2)).state
    ways = [tokens(2, 6, seed) for seed in (1, 2)]
    first, _ = read_by_steps(decoder, ways[0], start)
    second, _ = read_by_steps(decoder, ways[1], start)
    again, _ = read_by_steps(decoder, ways[0], start)
    assert torch.equal(first, again)
    assert_same(second, model(ways[1], start).logits_BTV, 1e-5)
    assert not torch.allclose(first, second)


def test_padding_stays_unseen(isa: str) -> None:
    model = model_of("odd")
    tokens_BT = tokens(2, 6)
    doc_BT = torch.tensor([[0] * 6, [0, 0, -1, -1, -1, -1]])
    state = model(tokens_BT, model.init_state(2), doc_BT).state
    logits_BV, _ = Decoder(model).step(torch.tensor([3, 4]), state)
    alone = model(torch.cat([tokens_BT[1:, :2], torch.tensor([[4]])], 1), model.init_state(1))
    assert_same(logits_BV[1], alone.logits_BTV[0, -1], 1e-5)


def test_another_document_stays_unseen(isa: str) -> None:
    model = model_of("hybrid")
    tokens_BT = tokens(1, 9)
    doc_BT = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    state = model(tokens_BT[:, :8], model.init_state(1), doc_BT[:, :8]).state
    logits_BV, _ = Decoder(model).step(tokens_BT[:, 8], state)
    alone = model(tokens_BT[:, 4:], model.init_state(1)).logits_BTV[:, -1]
    assert_same(logits_BV, alone, 1e-5)


@pytest.mark.parametrize(("weights", "tolerance"), [("bf16", 1e-5), ("int8", 2e-3)])
@pytest.mark.parametrize("name", ["odd", "odd-rms", "hybrid", "tied"])
def test_fewer_bits_equal_the_rounded_model(
    isa: str, name: str, weights: Weights, tolerance: float
) -> None:
    model = model_of(name)
    tokens_BT = tokens(3, 12)
    twin = rounded(model, weights)
    expected = twin(tokens_BT, model.init_state(3))
    logits_BTV, state = read_by_steps(Decoder(model, weights), tokens_BT, model.init_state(3))
    assert_same(logits_BTV, expected.logits_BTV, tolerance)
    assert_same(state, expected.state, tolerance)
    # and they are not the model itself
    exact = model(tokens_BT, model.init_state(3)).logits_BTV
    assert float((twin(tokens_BT, model.init_state(3)).logits_BTV - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_long_rows_of_the_largest_numbers_do_not_overflow(isa: str, weights: Weights) -> None:
    config = odd_config().model_dump()
    config["core"]["blocks"]["r"]["ffn"]["hidden_dim"] = 9001
    config["core"] |= {"pattern": ["r"], "blocks": {"r": config["core"]["blocks"]["r"]}}
    model = awake(ModelConfig.model_validate(config)).float().eval()
    ffn = model.core.layers[0].ffn
    assert isinstance(ffn, ChannelMix)
    # every product has the same sign and full size
    ffn.key.weight.copy_(torch.ones(9001, 1) * torch.randn(60, generator=torch.Generator()))
    ffn.value.weight.fill_(1.0)
    expected = model(tokens(2, 4), model.init_state(2)).logits_BTV
    for B in (1, 2):
        tokens_BT = tokens(2, 4)[:B]
        logits_BTV, _ = read_by_steps(Decoder(model, weights), tokens_BT, model.init_state(B))
        spread = float(expected.abs().max())
        assert float((logits_BTV - expected[:B]).abs().max()) < 0.05 * spread


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(isa: str, weights: Weights, broken: float) -> None:
    model = model_of("hybrid")
    model.embedding_norm.bias[3] = broken
    logits_BV, _ = Decoder(model, weights).step(torch.tensor([5]), model.init_state(1))
    assert not torch.isfinite(logits_BV).all()


def test_a_cache_in_bf16_is_read_and_written(isa: str) -> None:
    model = model_of("attention-gqa+swiglu")
    tokens_BT = tokens(2, 12)
    exact = model(tokens_BT, model.init_state(2)).logits_BTV[:, 8:]
    with torch.autocast("cpu", torch.bfloat16):
        state = model(tokens_BT[:, :8], model.init_state(2)).state
    assert state.layers[0][0].k_BKSH.dtype == torch.bfloat16
    decoder = Decoder(model, "bf16", precision="bf16")
    logits_BTV, state = read_by_steps(decoder, tokens_BT[:, 8:], state)
    assert state.layers[0][0].k_BKSH.dtype == torch.bfloat16
    assert float((logits_BTV - exact).abs().max() / exact.abs().max()) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        again = decoder.model(tokens_BT[:, 8:9], state).logits_BTV
    assert torch.isfinite(again).all()


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    model = model_of("odd")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(read_by_steps(Decoder(model), tokens(3, 6), model.init_state(3)))
    finally:
        torch.set_num_threads(before)
    for logits_BTV, state in found[1:]:
        assert torch.equal(logits_BTV, found[0][0])
        assert_same(state, found[0][1], 0.0)


def test_more_rows_than_a_step_takes_run_through_the_modules() -> None:
    model = model_of("hybrid")
    B = MAX_BATCH + 1
    expected = model(tokens(B, 3), model.init_state(B))
    logits_BTV, state = read_by_steps(Decoder(model), tokens(B, 3), model.init_state(B))
    assert_same(logits_BTV, expected.logits_BTV, 1e-5)
    assert_same(state, expected.state, 1e-5)


def test_a_mixer_without_a_step_just_runs() -> None:
    class Louder(ChannelMix):
        """A mixer of someone else's."""

        def forward(self, x_BTD: Tensor, state: Any, ctx: Any) -> Any:
            y_BTD, state, ctx = super().forward(x_BTD, state, ctx)
            return 2 * y_BTD, state, ctx

    model = model_of("hybrid")
    model.core.layers[1].ffn.__class__ = Louder
    expected = model(tokens(2, 5), model.init_state(2))
    decoder = Decoder(model)
    logits_BTV, state = read_by_steps(decoder, tokens(2, 5), model.init_state(2))
    assert sum(isinstance(step, ModuleStep) for step in steps_of(decoder)) == 1
    assert_same(logits_BTV, expected.logits_BTV, 1e-5)
    assert_same(state, expected.state, 1e-5)


def test_fp64_runs_through_the_modules() -> None:
    model = awake(CONFIGS["hybrid"])
    decoder = Decoder(model)
    logits_BTV, _ = read_by_steps(decoder, tokens(2, 5), model.init_state(2))
    assert decoder._steps is None
    assert logits_BTV.dtype == torch.float64
    torch.testing.assert_close(
        logits_BTV, model(tokens(2, 5), model.init_state(2)).logits_BTV, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("token", [-1, VOCAB, 1 << 40])
def test_a_token_outside_of_the_vocabulary_is_an_error(token: int) -> None:
    model = model_of("one-layer")
    with pytest.raises(IndexError, match="vocabulary"):
        Decoder(model).step(torch.tensor([token]), model.init_state(1))


def test_without_native_code_the_modules_serve_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VALKYRIE_NATIVE", "0")
    monkeypatch.setattr(decode, "_announced", set())
    model = model_of("hybrid")
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        found = [
            read_by_steps(Decoder(model, weights), tokens(2, 4), model.init_state(2))[0]
            for weights in ("fp32", "bf16", "int8")
        ]
    said = [r.message for r in caplog.records if "decoding runs through PyTorch" in r.message]
    assert len(said) == 1
    assert_same(found[0], model(tokens(2, 4), model.init_state(2)).logits_BTV, 1e-5)
    for weights, logits_BTV in zip(("bf16", "int8"), found[1:], strict=True):
        expected = rounded(model, weights)(tokens(2, 4), model.init_state(2)).logits_BTV
        assert_same(logits_BTV, expected, 1e-5)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounding_leaves_the_model_as_it_is(weights: Weights) -> None:
    model = model_of("tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = rounded(model, weights, "bf16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert twin.embedding.weight is model.embedding.weight
    assert twin.head.weight.dtype == torch.bfloat16
    assert not torch.equal(twin.head.weight.float(), model.head.weight)


STEPPED = [name for name in MOES if name.split("-")[1:2] not in (["exchange"], ["chain"])]
STEPPED = [name for name in STEPPED if "transformer" not in name]


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-5), ("int8", 2e-3)])
@pytest.mark.parametrize("name", STEPPED)
def test_steps_of_experts_equal_their_modules(
    isa: str, name: str, weights: Weights, tolerance: float
) -> None:
    # a width of 40, hidden layers of 12: no multiple of a group; biases that change who is chosen
    config = model_config("attention-nope", name, layers=2).model_dump()
    config["dim"] = 40
    model = awake(ModelConfig.model_validate(config)).float().eval()
    for module in model.modules():
        if isinstance(module, MoE):
            assert has_step(module)
            for router in module.each_router:
                router.bias_E.normal_(std=0.3)
    tokens_BT = tokens(5, 16)
    twin = rounded(model, weights)
    decoder = Decoder(model, weights)
    for B in (1, 5):
        expected = twin(tokens_BT[:B], model.init_state(B))
        logits_BTV, state = read_by_steps(decoder, tokens_BT[:B], model.init_state(B))
        assert_same(logits_BTV, expected.logits_BTV, tolerance)
        assert_same(state, expected.state, tolerance)
    assert not any(isinstance(step, ModuleStep) for step in steps_of(decoder))


def test_a_moved_bias_is_noticed() -> None:
    # what is made in inference mode counts no changes
    with torch.inference_mode(False):
        model = awake(model_config("attention", "moe", layers=1)).float().eval()
        decoder = Decoder(model)
        moe = next(module for module in model.modules() if isinstance(module, MoE))
        assert decoder.is_current(changes_only=True)
        moe.each_router[0].bias_E[0] += 1
        assert not decoder.is_current(changes_only=True)
