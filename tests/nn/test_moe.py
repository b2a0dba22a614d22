"""Routing, its losses, and experts as a slow twin computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.nn.menu import MOES, awake, model_config
from valkyrie_core.nn.moe.balance import (
    AuxConfig,
    Balance,
    ImportanceConfig,
    Traffic,
    ZLossConfig,
)
from valkyrie_core.nn.moe.dispatch import entries
from valkyrie_core.nn.moe.experts import grouped_linear, rounded_up
from valkyrie_core.nn.moe.gates import (
    Choice,
    NoisyTopK,
    SigmoidTopK,
    SoftmaxTopK,
    Switch,
    TopP,
)
from valkyrie_core.nn.moe.layer import MoE, MoEConfig
from valkyrie_core.nn.moe.router import GroupsConfig, traffic
from valkyrie_core.nn.state import Ctx

R, D, E = 37, 8, 6


def layer(**config: Any) -> MoE:
    """A layer in fp64 whose every weight is random."""
    torch.manual_seed(0)
    described = {"num_experts": E, "expert": {"type": "mlp", "hidden_dim": 10}, **config}
    moe = MoEConfig.model_validate(described).build(D, layer_idx=0, num_layers=1)
    assert isinstance(moe, MoE)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe.double().eval()


def tokens(rows: int = R) -> Tensor:
    return torch.randn(1, rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(moe: MoE, x_BTD: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, Ctx]:
    zeros_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64)
    ctx = Ctx(pos_BT=zeros_BT, segment_BT=zeros_BT, valid_BT=valid_BT)
    y_BTD, _, ctx = moe(x_BTD, (), ctx)
    return y_BTD, ctx


GATES: dict[str, dict[str, Any]] = {
    "softmax": {"type": "softmax_topk", "top_k": 3},
    "one": {"type": "softmax_topk", "top_k": 1},
    "sigmoid": {"type": "sigmoid_topk", "top_k": 2, "scale": 2.0},
    "noisy": {"type": "noisy_topk", "top_k": 2},
    "switch": {"type": "switch"},
    "top_p": {"type": "top_p", "mass": 0.6, "max_experts": 4},
}


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("gate", GATES)
def test_a_token_gets_the_weighted_sum_of_its_experts(gate: str, shared: int) -> None:
    """Token by token and expert by expert, in plain formulas."""
    moe = layer(gate=GATES[gate], shared_experts=shared)
    x_BTD = tokens()
    y_BTD, _ = run(moe, x_BTD)
    logits_RE, choice = moe.routers[0](x_BTD[0])
    torch.testing.assert_close(logits_RE, x_BTD[0] @ moe.routers[0].weight_ED.T)
    for row, x_D in enumerate(x_BTD[0]):
        expected_D = torch.zeros(D, dtype=torch.float64)
        for slot, expert in enumerate(choice.experts_RK[row].tolist()):
            if choice.used_RK is not None and not choice.used_RK[row, slot]:
                continue
            gated = F.silu(moe.experts.gate_EHD[expert] @ x_D) * (moe.experts.up_EHD[expert] @ x_D)
            weight = choice.weights_RK[row, slot]
            expected_D = expected_D + weight * (moe.experts.down_EDH[expert] @ gated)
        if moe.shared is not None:
            expected_D = expected_D + moe.shared.down(
                F.silu(moe.shared.gate(x_D)) * moe.shared.up(x_D)
            )
        torch.testing.assert_close(y_BTD[0, row], expected_D)


def choose(gate: torch.nn.Module, logits: list[list[float]], **keywords: Any) -> Choice:
    logits_RE = torch.tensor(logits)
    choice: Choice = gate.eval()(logits_RE, logits_RE, keywords.get("rank", lambda x: x))
    return choice


def test_gates_by_hand() -> None:
    logits = [[2.0, 0.0, 1.0, -1.0]]
    probs = torch.tensor(logits).softmax(-1)[0]
    soft = choose(SoftmaxTopK(2), logits)
    assert soft.experts_RK.tolist() == [[0, 2]]
    torch.testing.assert_close(soft.weights_RK[0], probs[[0, 2]] / probs[[0, 2]].sum())
    # alone it keeps its probability: scaled to 1 there would be no gradient for the router
    torch.testing.assert_close(choose(SoftmaxTopK(1), logits).weights_RK[0], probs[[0]])
    torch.testing.assert_close(choose(Switch(0.5), logits).weights_RK[0], probs[[0]])
    sigmoid = choose(SigmoidTopK(2, 3.0), logits)
    affinity = torch.tensor(logits).sigmoid()[0]
    torch.testing.assert_close(sigmoid.weights_RK[0], 3 * affinity[[0, 2]] / affinity[[0, 2]].sum())
    torch.testing.assert_close(sigmoid.probs_RE.sum(-1), torch.ones(1))


def test_an_unsure_router_takes_more_experts() -> None:
    gate = TopP(0.7, 3)
    sure = choose(gate, [[5.0, 0.0, 0.0, 0.0]])
    unsure = choose(gate, [[0.3, 0.2, 0.1, 0.0]])
    assert sure.used_RK is not None
    assert unsure.used_RK is not None
    assert sure.used_RK.tolist() == [[True, False, False]]
    assert unsure.used_RK.tolist() == [[True, True, True]]
    for choice in (sure, unsure):
        torch.testing.assert_close(choice.weights_RK.sum(-1), torch.ones(1))
    assert sure.weights_RK[0, 1:].tolist() == [0.0, 0.0]


def test_equal_experts_are_chosen_in_order_whatever_the_batch() -> None:
    for rows in (1, 3, 50):
        choice = choose(SoftmaxTopK(2), [[0.5] * 9] * rows)
        assert choice.experts_RK.tolist() == [[0, 1]] * rows


def test_noise_is_of_training_alone() -> None:
    torch.manual_seed(0)
    logits_RE = torch.randn(200, E)
    for gate in (NoisyTopK(E, E, 2), Switch(0.9)):
        quiet = gate.eval()(logits_RE, logits_RE, lambda x: x)
        assert torch.equal(quiet.probs_RE, logits_RE.softmax(-1))
        loud = gate.train()(logits_RE, logits_RE, lambda x: x)
        assert not torch.equal(loud.experts_RK, quiet.experts_RK)


def test_the_scale_of_the_noise_is_learned() -> None:
    gate = NoisyTopK(E, E, 2).train()
    x_RD = torch.randn(64, E)
    choice = gate(x_RD, x_RD, lambda x: x)
    choice.weights_RK.square().sum().backward()
    assert gate.noise_ED.grad is not None
    assert gate.noise_ED.grad.abs().sum() > 0


def test_a_bias_changes_who_is_chosen_and_never_the_weights() -> None:
    moe = layer(gate={"type": "sigmoid_topk", "top_k": 2})
    x_RD = tokens()[0]
    _, before = moe.routers[0](x_RD)
    moe.routers[0].bias_E[4] = 10
    _, after = moe.routers[0](x_RD)
    assert (after.experts_RK == 4).any(1).all()
    affinity_RE = (x_RD @ moe.routers[0].weight_ED.T).sigmoid()
    expected_RK = affinity_RE.gather(1, after.experts_RK)
    torch.testing.assert_close(after.weights_RK, expected_RK / expected_RK.sum(-1, keepdim=True))
    torch.testing.assert_close(before.probs_RE, after.probs_RE)


def test_groups_are_chosen_first() -> None:
    ranked_RE = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.4]])
    one = GroupsConfig(num_groups=2, top_groups=1).limit(ranked_RE)
    # 0.9 + 0.0 is less than 0.5 + 0.5
    assert one.tolist() == [[-torch.inf] * 3 + ranked_RE[0, 3:].tolist()]
    assert torch.equal(GroupsConfig(num_groups=2, top_groups=2).limit(ranked_RE), ranked_RE)


@pytest.mark.parametrize("gate", ["softmax", "top_p"])
def test_tokens_stay_within_their_groups(gate: str) -> None:
    moe = layer(gate=GATES[gate], groups={"num_groups": 3, "top_groups": 2}, num_experts=12)
    _, choice = moe.routers[0](tokens()[0])
    used_RK = torch.ones_like(choice.experts_RK) > 0 if choice.used_RK is None else choice.used_RK
    for experts_K, used_K in zip(choice.experts_RK, used_RK, strict=True):
        assert len(set((experts_K[used_K] // 4).tolist())) <= 2


def test_confidence_begins_by_changing_nothing_and_spreads_where_it_is_low() -> None:
    plain, sure = layer(gate=GATES["top_p"]), layer(gate=GATES["top_p"], confidence={})
    assert sure.routers[0].confidence_1D is not None
    sure.load_state_dict({**plain.state_dict(), "routers.0.confidence_1D": torch.zeros(1, D)})
    x_BTD = tokens()
    torch.testing.assert_close(run(sure, x_BTD)[0], run(plain, x_BTD)[0])
    with torch.no_grad():
        sure.routers[0].confidence_1D.copy_(-3 * torch.sign(x_BTD[0, :1]))
    # the first token's confidence is nearly 0
    _, low = sure.routers[0](x_BTD[0, :1])
    _, before = plain.routers[0](x_BTD[0, :1])
    assert low.used_RK.sum() >= before.used_RK.sum()
    assert low.probs_RE.max() < before.probs_RE.max()
    confidence_R = sure.routers[0].confidence(x_BTD[0])
    assert confidence_R is not None
    assert confidence_R[0] < 0.05
    assert plain.routers[0].confidence(x_BTD[0]) is None


@pytest.mark.parametrize("used", [None, "some", "none of one"])
def test_entries_are_sorted_and_complete(used: str | None) -> None:
    torch.manual_seed(3)
    experts_RK = torch.stack([torch.randperm(E)[:3] for _ in range(R)])
    used_RK = None
    if used == "some":
        used_RK = torch.rand(R, 3) < 0.5
    elif used == "none of one":
        used_RK = experts_RK != 2
    choice = Choice(experts_RK, torch.rand(R, 3), used_RK, torch.rand(R, E))
    plan = entries(choice, E)
    assert sum(plan.sizes) == (R * 3 if used_RK is None else int(used_RK.sum()))
    assert plan.experts_M.tolist() == sorted(plan.experts_M.tolist())
    assert torch.equal(experts_RK[plan.tokens_M, plan.slots_M], plan.experts_M)
    assert torch.bincount(plan.experts_M, minlength=E).tolist() == list(plan.sizes)
    places_M = plan.places_RK[plan.tokens_M, plan.slots_M]
    assert torch.equal(places_M, torch.arange(sum(plan.sizes)))
    assert int((plan.places_RK < 0).sum()) == R * 3 - sum(plan.sizes)
    if used == "none of one":
        assert plan.sizes[2] == 0


def test_experts_without_tokens_are_no_trouble() -> None:
    moe = layer().train()
    moe.routers[0].bias_E[:2] = 100
    x_BTD = tokens().requires_grad_()
    y_BTD, ctx = run(moe, x_BTD)
    assert ctx.routed[0].load_E.tolist() == [R, R, 0, 0, 0, 0]
    y_BTD.square().sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert not parameter.grad[2:].any()


@pytest.mark.parametrize(
    "sizes", [(5, 0, 3), (0, 0, 8), (8, 0, 0), (33, 1, 70), (17, 17, 17), (130, 2, 3), (1, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_grouped_products_equal_those_of_each_expert(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also where rows are rounded up, into the next expert's or beyond the last one's."""
    torch.manual_seed(0)
    x_MI = torch.randn(sum(sizes), 16, dtype=dtype, requires_grad=True)
    weight_EOI = torch.randn(3, 24, 16, dtype=dtype, requires_grad=True)
    pieces = zip(x_MI.split(sizes), weight_EOI, strict=True)
    expected = torch.cat([F.linear(x, weight) for x, weight in pieces])
    dy_MO = torch.randn_like(expected)
    given_MO = dy_MO.clone()
    wanted = torch.autograd.grad(expected, (x_MI, weight_EOI), dy_MO)
    found = grouped_linear(x_MI, weight_EOI, sizes)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found, (x_MI, weight_EOI), dy_MO)
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)
    # what stood in for zeros meanwhile is back
    assert torch.equal(dy_MO, given_MO)


def test_grouped_products_equal_torch_s_own() -> None:
    torch.manual_seed(0)
    x_MI = torch.randn(8, 16, dtype=torch.bfloat16)
    weight_EOI = torch.randn(3, 24, 16, dtype=torch.bfloat16)
    stops_E = torch.tensor([5, 5, 8], dtype=torch.int32)
    expected = F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=stops_E)
    torch.testing.assert_close(grouped_linear(x_MI, weight_EOI, (5, 0, 3)), expected)


def test_rows_are_rounded_to_few_numbers() -> None:
    rounded = {rounded_up(size) for size in range(1, 4097)}
    assert len(rounded) < 70
    for size in range(1, 4097):
        assert size <= rounded_up(size) < max(size + 64, 1.13 * size)


@pytest.mark.parametrize("config", [AuxConfig(), ZLossConfig(), ImportanceConfig()])
def test_losses_of_padding_alone_are_nothing(config: Any) -> None:
    logits_RE = torch.zeros(0, 4, requires_grad=True)
    empty = logits_RE.softmax(-1)
    loss = config.loss(Traffic(logits_RE, empty, empty, torch.zeros(4)))
    assert float(loss.detach()) == 0


@pytest.mark.parametrize(
    "gate",
    [SoftmaxTopK(2), SigmoidTopK(2, 1.0), TopP(0.5, 2)],
    ids=lambda gate: type(gate).__name__,
)
def test_weights_that_underflow_are_nothing(gate: Any) -> None:
    # the best one may not be chosen, and next to it the others are less than any number
    logits_RE = torch.tensor([[160.0, -160, -160, -160]])
    barred_E = torch.tensor([-2.0, 0, 0, 0])
    choice = gate(torch.zeros(1, 3), logits_RE, lambda affinity_RE: affinity_RE + barred_E)
    assert choice.weights_RK.tolist() == [[0, 0]]


def test_losses_by_hand() -> None:
    probs_RE = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    logits_RE = probs_RE.log()
    done = Traffic(logits_RE, probs_RE, probs_RE, torch.tensor([2.0, 0.0]))
    assert float(AuxConfig(coefficient=0.1).loss(done)) == pytest.approx(0.1 * 2 * 0.7)
    assert float(ZLossConfig(coefficient=0.5).loss(done)) == pytest.approx(0, abs=1e-12)
    shifted = done._replace(logits_RE=logits_RE + 3)
    assert float(ZLossConfig(coefficient=0.5).loss(shifted)) == pytest.approx(0.5 * 9)
    # sums 1.4 and 0.6: mean 1, variance 0.16
    assert float(ImportanceConfig(coefficient=1.0).loss(done)) == pytest.approx(0.16)
    even = torch.full((4, 2), 0.5)
    balanced = Traffic(even, even, even, torch.tensor([2.0, 2.0]))
    assert float(AuxConfig(coefficient=1.0).loss(balanced)) == pytest.approx(1)
    assert float(ImportanceConfig(coefficient=1.0).loss(balanced)) == 0


LOSSES: tuple[type[Balance], ...] = (AuxConfig, ZLossConfig, ImportanceConfig)


@pytest.mark.parametrize("kind", [loss.model_fields["type"].default for loss in LOSSES])
@pytest.mark.parametrize("recomputes", [False, True])
def test_every_loss_of_every_layer_reaches_the_total(kind: str, recomputes: bool) -> None:
    config = model_config("attention", "moe", layers=3).model_dump()
    config["core"]["blocks"]["block"]["ffn"]["balance"] = [{"type": kind, "coefficient": 0.3}]
    from valkyrie_core.nn.backbone import ModelConfig

    model = awake(ModelConfig.model_validate(config)).train()
    model.core.recomputes = recomputes
    x = torch.randint(0, 23, (2, 11))
    loss, _, told = model.loss(x, x, model.init_state(2))
    nats, _ = model.token_losses(x, x, model.init_state(2))
    assert told.aux.keys() == {kind}
    assert len(told.routed) == 3
    torch.testing.assert_close(loss, nats.mean() + told.aux[kind])
    before = [p.clone() for p in model.parameters()]
    (gradient,) = torch.autograd.grad(loss, [model.core.layers[1].ffn.routers[0].weight_ED])
    (alone,) = torch.autograd.grad(
        model.token_losses(x, x, model.init_state(2))[0].mean(),
        [model.core.layers[1].ffn.routers[0].weight_ED],
    )
    assert (gradient - alone).abs().max() > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # outside of training nothing is added
    loss, _, told = model.eval().loss(x, x, model.init_state(2))
    assert not told.aux
    torch.testing.assert_close(loss, nats.mean())


def test_padding_is_nobody_s_traffic() -> None:
    moe = layer(balance=[{"type": "aux"}, {"type": "z_loss"}, {"type": "importance"}]).train()
    x_BTD = tokens()
    valid_BT = torch.arange(R)[None] < 20
    _, padded = run(moe, x_BTD, valid_BT)
    _, alone = run(moe, x_BTD[:, :20])
    assert padded.routed[0].load_E.sum() == 40
    assert torch.equal(padded.routed[0].load_E, alone.routed[0].load_E)
    for (name, value), (_, expected) in zip(padded.aux, alone.aux, strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def test_loads_are_what_was_chosen() -> None:
    moe = layer(gate=GATES["top_p"])
    x_RD = tokens()[0]
    logits_RE, choice = moe.routers[0](x_RD)
    done = traffic(logits_RE, choice, None)
    assert choice.used_RK is not None
    chosen = choice.experts_RK[choice.used_RK]
    assert done.load_E.tolist() == torch.bincount(chosen, minlength=E).tolist()
    torch.testing.assert_close(done.weights_RE.sum(-1), torch.ones(R, dtype=torch.float64))


@pytest.mark.parametrize("name", MOES)
def test_reading_moves_no_bias_and_no_counter(name: str) -> None:
    model = awake(model_config("attention", name))
    for training in (True, False):
        model.train(training)
        before = {key: value.clone() for key, value in model.named_buffers()}
        model(torch.randint(0, 23, (2, 9)), model.init_state(2))
        assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_the_first_layers_are_dense_and_as_wide() -> None:
    model = awake(model_config("attention", "moe-switch", layers=3))
    dense, *others = [layer.ffn for layer in model.core.layers]
    assert not isinstance(dense, MoE)
    assert dense.hidden_dim == 12
    assert all(isinstance(ffn, MoE) for ffn in others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate": {"type": "softmax_topk", "top_k": 9}}, "can't meet 9 experts"),
        ({"groups": {"num_groups": 3}}, "must divide num_experts"),
        ({"groups": {"num_groups": 4, "top_groups": 5}}, "is more than the 4 groups"),
        (
            {"groups": {"num_groups": 4}, "gate": {"type": "softmax_topk", "top_k": 3}},
            "the experts of top_groups groups are 2",
        ),
        ({"balance": [{"type": "aux"}, {"type": "aux"}]}, "'aux' is there twice"),
    ],
)
def test_numbers_that_do_not_agree_are_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoEConfig.model_validate({"num_experts": 8, **changes})


def test_a_router_stays_in_fp32() -> None:
    from valkyrie_core.nn.layers import parameter_roles

    lm = awake(model_config("attention", "moe-noisy"))
    roles = parameter_roles(lm)
    assert roles["core.layers.0.ffn.routers.0.weight_ED"] == "router"
    assert roles["core.layers.0.ffn.routers.0.gate.noise_ED"] == "router"
    assert roles["core.layers.0.ffn.experts.down_EDH"] == "matrix"
    moe = layer().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_RE, choice = moe.routers[0](tokens()[0].bfloat16())
    assert logits_RE.dtype == choice.weights_RK.dtype == torch.float32
