"""What an expert is worth: the loss where routers may not choose it, and others fill in.

Routing statistics do not predict this (arXiv 2606.10703), so it is measured, one expert at a time,
on the same windows with and without it.

Shapes: W windows, E experts, G domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from valkyrie_core.errors import DivergedError
from valkyrie_core.experts.measures import Floats, Ints
from valkyrie_core.experts.observe import Progress, batches, moe_layers, reading
from valkyrie_core.experts.text import Text
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.moe.gates import TopPConfig
from valkyrie_core.nn.moe.layer import MoE, MoEConfig
from valkyrie_core.nn.moe.router import Router
from valkyrie_core.nn.weights import Precision


class KnockOuts(NamedTuple):
    """Losses without one expert, less those with all of them."""

    tokens_W: Ints
    """Scored tokens of every window, all domains' one after the other."""
    domain_W: Ints
    change_EW: dict[int, Floats]
    """By layer: nats, summed over a window's tokens; more is worse without the expert."""


@contextmanager
def without(moe: MoE, expert: int) -> Iterator[None]:
    """No router of the layer chooses the expert until the end of the context.

    Its bias, which decides what is chosen and weighs nothing, is minus infinity meanwhile.
    """
    biases = [router.bias_E for router in moe.routers if isinstance(router, Router)]
    before = [bias_E.clone() for bias_E in biases]
    try:
        with torch.no_grad():
            for bias_E in biases:
                bias_E[expert] = -torch.inf
        yield
    finally:
        with torch.no_grad():
            for bias_E, kept_E in zip(biases, before, strict=True):
                bias_E.copy_(kept_E)


def obstacle(config: MoEConfig) -> str | None:
    """Why no expert can be removed: because a token needs all it may choose among. None: it can."""
    if isinstance(config.gate, TopPConfig) and config.gate.mass < 1:
        # takes fewer where there are fewer
        return None
    slots = config.gate.divided(config.rounds).slots
    if config.groups is None:
        choice = config.num_experts - 1
    else:
        size = config.num_experts // config.groups.num_groups
        choice = config.groups.top_groups * size
        if not closes_group(config):
            choice -= 1
    return None if slots <= choice else f"a token meets all of the {slots} experts it may choose"


def closes_group(config: MoEConfig) -> bool:
    """Whether a group that lacks one expert is never chosen, so that all of it is removed.

    A group is worth its two best experts: of two, a missing one makes it worthless.
    """
    groups = config.groups
    if groups is None or groups.top_groups == groups.num_groups:
        return False
    return config.num_experts // groups.num_groups <= 2


def window_losses(model: HybridLM, texts: Sequence[Text], precision: Precision = "fp32") -> Floats:
    """[W] nats of every window, summed over its scored tokens."""
    device = model.embedding.weight.device
    sums = []
    for batch in batches(texts):
        text = batch.text
        state = model.init_state(len(text.tokens_WT))
        with torch.inference_mode(), reading(model, precision):
            nats_BT, _ = model.token_losses(
                text.tokens_WT.to(device), text.targets_WT.to(device), state, text.doc_WT.to(device)
            )
        sums.append(nats_BT.double().sum(1).cpu().numpy())
    return np.concatenate(sums)


def knock_out(
    model: HybridLM,
    texts: Sequence[Text],
    *,
    precision: Precision = "fp32",
    told: Progress | None = None,
) -> KnockOuts:
    """Every expert of every layer, one at a time; the model is as before afterwards.

    Layers whose experts can't be removed are left out (see `obstacle`). Raises DivergedError where
    a loss is not finite.
    """
    layers = {i: moe for i, moe in moe_layers(model).items() if obstacle(moe.config) is None}
    plan = [(index, expert) for index, moe in layers.items() for expert in range(_count(moe))]
    read = sum(text.num_tokens for text in texts)
    before_W = window_losses(model, texts, precision)
    change = {index: np.zeros((_count(moe), len(before_W))) for index, moe in layers.items()}
    for done, (index, expert) in enumerate(plan, start=1):
        with without(layers[index], expert):
            change[index][expert] = window_losses(model, texts, precision) - before_W
        if not np.isfinite(change[index][expert]).all():
            raise DivergedError(
                "the loss on the text is not finite",
                hint="the weights are damaged or the training diverged: take an earlier "
                "checkpoint with --step",
            )
        if told is not None:
            told("knock-outs", done * read, len(plan) * read)
    tokens = [(text.targets_WT != IGNORED).sum(1).numpy() for text in texts]
    domains = [np.full(len(text.tokens_WT), g) for g, text in enumerate(texts)]
    return KnockOuts(np.concatenate(tokens), np.concatenate(domains), change)


def _count(moe: MoE) -> int:
    return moe.config.num_experts
