"""Native code is given pointers: wrong shapes and types are refused before it sees any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.menu import VOCAB, awake, hybrid_config
from valkyrie_core.infer.engine import Engine
from valkyrie_core.kernels import rows, wkv7
from valkyrie_core.kernels.attention import blocked_attention
from valkyrie_core.kernels.gated import silu_times
from valkyrie_core.kernels.loss import linear_cross_entropy
from valkyrie_core.kernels.norm_rope import norm_rope
from valkyrie_core.kernels.relu_squared import relu_squared
from valkyrie_core.kernels.shift_mix import shift_mix

PLACES = torch.arange(6).view(3, 2)


def R(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def wkv_inputs(B: int = 2, T: int = 5, N: int = 3, H: int = 8) -> list[Tensor]:
    return [R(B, T, N, H), -R(B, T, N, H).sigmoid() / 2, *(R(B, T, N, H) / 9 for _ in range(4))]


def wkv(change: Callable[[list[Any]], None], *rest: Any) -> Tensor:
    inputs = wkv_inputs()
    change(inputs)
    return wkv7(*inputs, *rest)[0]


def cut(index: int, window: Any) -> Callable[[list[Any]], None]:
    def change(inputs: list[Any]) -> None:
        inputs[index] = inputs[index][window]

    return change


def nothing(inputs: list[Any]) -> None:
    """Leaves all as it is."""


def bf16(*shape: int) -> Tensor:
    return R(*shape).bfloat16()


SOURCE = torch.tensor([[-1, 0, 1], [-2, 0, 1]], dtype=torch.int32)
WRONG: dict[str, Callable[[], Any]] = {
    "wkv7, fewer keys": lambda: wkv(cut(2, slice(0, 1))),
    "wkv7, fewer tokens": lambda: wkv(cut(3, (slice(None), slice(0, 3)))),
    "wkv7, narrower heads": lambda: wkv(cut(4, (..., slice(0, 4)))),
    "wkv7, no token": lambda: wkv7(*wkv_inputs(T=0)),
    "wkv7, state of one row": lambda: wkv(nothing, R(1, 3, 8, 8)),
    "wkv7, documents of one row": lambda: wkv(nothing, None, torch.zeros(1, 5).long()),
    "wkv7, decay above 0": lambda: wkv(lambda x: x[1].neg_()),
    "wkv7, decay below -1": lambda: wkv(lambda x: x[1].mul_(9)),
    "silu_times": lambda: silu_times(R(4, 8), R(8)),
    "spread, places": lambda: rows.spread(R(3, 8), PLACES[:2], 6),
    "spread, a place": lambda: rows.spread(R(3, 8), PLACES, 5),
    "spread, type of places": lambda: rows.spread(R(3, 8), PLACES.int(), 6),
    "blend, weights": lambda: rows.blend(R(6, 8), R(3, 1), PLACES),
    "blend, a place": lambda: rows.blend(R(5, 8), R(3, 2), PLACES),
    "shift_mix, last": lambda: shift_mix(R(2, 3, 8), R(1, 8), SOURCE, (R(8),)),
    "shift_mix, type": lambda: shift_mix(R(2, 3, 8), bf16(2, 8), SOURCE, (R(8),)),
    "shift_mix, source type": lambda: shift_mix(R(2, 3, 8), R(2, 8), SOURCE.long(), (R(8),)),
    "shift_mix, source": lambda: shift_mix(R(2, 3, 8), R(2, 8), SOURCE + 10**7, (R(8),)),
    "norm_rope, weight": lambda: norm_rope(R(2, 3, 2, 8), R(4), None, None, 1e-5),
    "norm_rope, cos": lambda: norm_rope(R(2, 3, 2, 8), R(8), R(1, 3, 4), R(1, 3, 4), 1e-5),
    "attention, keys": lambda: blocked_attention(bf16(2, 6, 4, 8), *[bf16(2, 5, 4, 8)] * 2),
    "attention, heads": lambda: blocked_attention(bf16(2, 6, 4, 8), *[bf16(2, 6, 3, 8)] * 2),
    "attention, type": lambda: blocked_attention(bf16(2, 6, 4, 8), *[R(2, 6, 4, 8)] * 2),
    "attention, segments": lambda: blocked_attention(
        *[bf16(2, 6, 4, 8)] * 3, torch.zeros(1, 6).long()
    ),
    "loss, targets": lambda: linear_cross_entropy(R(6, 8), R(5, 8), torch.zeros(3).long()),
    "loss, type": lambda: linear_cross_entropy(R(6, 8), R(5, 8), torch.zeros(6).int()),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r" is | has |don't|not within"):
        WRONG[case]()


def test_a_state_of_other_rows_is_refused() -> None:
    model = awake(hybrid_config()).float().eval()
    tokens_BT = torch.randint(0, VOCAB, (2, 20))
    for call in (
        lambda: model(tokens_BT, model.init_state(1)),
        lambda: model.loss(tokens_BT, tokens_BT, model.init_state(3)),
        lambda: model(tokens_BT, model.init_state(2), torch.zeros(1, 20).long()),
        lambda: model(tokens_BT[:, :0], model.init_state(2)),
        lambda: Engine(model).decode_one_token(torch.tensor([5] * 8), model.init_state(1)),
    ):
        with pytest.raises(ValueError, match=r"row|token|doc_BT"):
            call()


def test_an_empty_window_has_no_garbage_in_its_gradients() -> None:
    last, mix = R(2, 16).requires_grad_(), R(16).requires_grad_()
    (y,) = shift_mix(R(2, 0, 16), last, torch.zeros(2, 0).int(), (mix,))
    y.sum().backward()
    assert last.grad is not None
    assert not last.grad.any()
    weight = R(8).requires_grad_()
    norm_rope(R(2, 0, 2, 8), weight, None, None, 1e-5).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    empty = bf16(2, 0, 4, 8).requires_grad_()
    blocked_attention(empty, empty, empty).sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: wkv7(*wkv_inputs()[:2], x, *wkv_inputs()[3:])[0],
        lambda x: relu_squared(x),
        lambda x: silu_times(x, x),
        lambda x: rows.spread(x.view(30, 8), torch.arange(60).view(30, 2), 60),
        lambda x: rows.blend(x.view(30, 8), R(15, 2), torch.arange(30).view(15, 2)),
        lambda x: norm_rope(x, R(8), None, None, 1e-5),
    ],
)
def test_second_derivatives_are_refused_and_not_zero(call: Callable[[Tensor], Tensor]) -> None:
    x = R(2, 5, 3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_types_of_tokens_and_of_results() -> None:
    model = awake(hybrid_config()).float().eval()
    engine = Engine(model)
    tokens_BT = torch.randint(0, VOCAB, (1, 3))
    found = engine.prefill(tokens_BT.int(), model.init_state(1))
    expected = engine.prefill(tokens_BT, model.init_state(1))
    assert found is not None
    assert expected is not None
    assert torch.equal(found.logits_BV, expected.logits_BV)
    half = [x.half() for x in wkv_inputs()]
    assert wkv7(*half)[0].dtype == torch.float16


def test_any_negative_document_is_padding() -> None:
    model = awake(hybrid_config()).float().eval()
    engine = Engine(model)
    tokens_BT = torch.randint(0, VOCAB, (1, 3))
    results = [
        engine.prefill(tokens_BT, model.init_state(1), torch.tensor([[3, 3, padding]]))
        for padding in (-1, -2)
    ]
    assert results[0] is not None
    assert results[1] is not None
    assert torch.equal(results[0].logits_BV, results[1].logits_BV)


def test_refresh_sees_what_was_written_behind_the_engine() -> None:
    model = awake(hybrid_config()).float().eval()
    engine = Engine(model)
    tokens_BT = torch.randint(0, VOCAB, (1, 3))
    before = engine.prefill(tokens_BT, model.init_state(1))
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    engine.refresh()
    after = engine.prefill(tokens_BT, model.init_state(1))
    assert before is not None
    assert after is not None
    assert not torch.equal(before.logits_BV, after.logits_BV)
