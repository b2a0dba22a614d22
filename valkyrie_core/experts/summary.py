"""From what was watched to the report of each layer.

Shapes: E experts, G domains, W windows, R tokens, K slots of a token, C rounds of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from valkyrie_core.experts import measures
from valkyrie_core.experts.history import History, dead_steps
from valkyrie_core.experts.knockout import KnockOuts, closes_group, obstacle
from valkyrie_core.experts.measures import Choices, Ints
from valkyrie_core.experts.observe import Trace
from valkyrie_core.nn.moe.layer import MoEConfig
from valkyrie_core.report.experts import (
    DeadExpert,
    KnockOut,
    LayerExperts,
    MutualInformation,
    TokenLift,
)

TOP_TOKENS = 10
"""Kinds of tokens that are told of an expert."""
LEAST_COUNT = 5
"""Tokens of a kind that an expert has met at least: a lift of fewer is chance."""
CLOSES_GROUP = (
    "a group of two experts is not chosen while one of them is removed: changes are those of "
    "removing the group"
)


class Setting(NamedTuple):
    """What all layers share."""

    domains: Sequence[str]
    shown: Callable[[int], str]
    """A token as text."""
    seed: int
    shuffles: int


def describe(
    layer: int,
    block: str,
    config: MoEConfig,
    trace: Trace,
    history: History | None,
    knock_outs: KnockOuts | None,
    setting: Setting,
) -> LayerExperts:
    """The report of one layer; `knock_outs` None: they were not asked for."""
    E = config.num_experts
    own = trace.layers[layer]
    experts_RK = own.experts_RK
    load_E = measures.loads(experts_RK, E)
    shares_E = measures.over_ideal(load_E)
    effective = measures.effective_experts(load_E)
    dying = measures.dead(load_E)
    note = None
    if knock_outs is not None:
        note = obstacle(config) or (CLOSES_GROUP if closes_group(config) else None)
    return LayerExperts(
        layer=layer,
        block=block,
        gate=config.gate.type,
        num_experts=E,
        top_k=config.gate.slots,
        rounds=config.rounds,
        load=None if shares_E is None else shares_E.tolist(),
        load_min=None if shares_E is None else float(shares_E.min()),
        load_max=None if shares_E is None else float(shares_E.max()),
        load_cv=measures.variation(load_E),
        max_vio=measures.max_vio(load_E),
        max_vio_per_batch=measures.mean_max_vio(grouped_loads(experts_RK, trace.batch_R, E)),
        load_entropy=None if effective is None else float(np.log(effective) / np.log(E)),
        effective_experts=effective,
        experts_per_token=measures.experts_per_token(experts_RK),
        dead=None
        if dying is None
        else [
            DeadExpert(
                expert=expert,
                load=0.0 if shares_E is None else float(shares_E[expert]),
                steps=dead_steps(history, expert),
            )
            for expert in dying
        ],
        routing_entropy=own.entropy,
        top1_margin=own.margin,
        mutual_information=_information(experts_RK, trace, E, setting),
        co_activation=measures.co_activation(own.experts_CRK, E),
        top_tokens=_top_tokens(trace, experts_RK, E, setting),
        knock_out=None if knock_outs is None else _knock_out(layer, knock_outs, setting),
        knock_out_note=note,
    )


def grouped_loads(experts_RK: Choices, group_R: Ints, num_experts: int) -> Ints:
    """[groups, E] the load of every window, or batch."""
    used_RK = experts_RK >= 0
    groups = int(group_R.max()) + 1
    place_RK = group_R[:, None] * num_experts + experts_RK.astype(np.int64)
    counts = np.bincount(place_RK[used_RK], minlength=groups * num_experts)
    return counts.reshape(groups, num_experts)


def _information(
    experts_RK: Choices, trace: Trace, num_experts: int, setting: Setting
) -> MutualInformation | None:
    counts_WE = grouped_loads(experts_RK, trace.window_R, num_experts)
    counts_GE = measures.by_domain(counts_WE, trace.domain_W, len(setting.domains))
    value = measures.mutual_information(counts_GE)
    if value is None:
        return None
    null = measures.shuffled_information(
        counts_WE, trace.domain_W, shuffles=setting.shuffles, seed=setting.seed
    )
    return MutualInformation(
        value=value,
        null_mean=None if null is None else null.mean,
        null_95=None if null is None else null.high,
    )


def _top_tokens(
    trace: Trace, experts_RK: Choices, num_experts: int, setting: Setting
) -> list[list[TokenLift]]:
    found = measures.top_tokens(
        trace.tokens_R, experts_RK, num_experts, count=TOP_TOKENS, least=LEAST_COUNT
    )
    return [
        [
            TokenLift(token=one.token, text=setting.shown(one.token), count=one.met, lift=one.lift)
            for one in lifts
        ]
        for lifts in found
    ]


def _knock_out(layer: int, found: KnockOuts, setting: Setting) -> list[KnockOut] | None:
    if layer not in found.change_EW:
        return None
    rows = []
    for number, name in enumerate(setting.domains):
        here_W = found.domain_W == number
        tokens_W = found.tokens_W[here_W]
        if not tokens_W.sum():
            continue
        change_EW = found.change_EW[layer][:, here_W]
        change = (change_EW.sum(1) / tokens_W.sum()).tolist()
        ranges = measures.intervals(change_EW, tokens_W, seed=setting.seed)
        rows.append(
            KnockOut(
                domain=name,
                change=change,
                low=[None for _ in change] if ranges is None else [low for low, _ in ranges],
                high=[None for _ in change] if ranges is None else [high for _, high in ranges],
                specialisation=measures.gini(change),
            )
        )
    return rows or None
