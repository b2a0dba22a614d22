"""The stack, a row a layer: what each layer is, holds and costs. No weights are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from valkyrie_core.allocate.match import layers_of
from valkyrie_core.nn.attention import Attention
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import Block
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.canvas_core import CanvasCore
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.state import Cost
from valkyrie_core.plan.flops import HEAD, state_bytes, training_flops, weights_read
from valkyrie_core.plan.parameters import weightless

VALUE_BYTES = 2
"""Bytes of a weight, key or value when decoding in bf16; recurrent states are in fp32 always."""


class LayerRow(NamedTuple):
    """One layer, or what stands before and after the layers."""

    layer: int | None
    """From 0; None for the embedding and the head."""
    block: str
    """The block's name in the recipe."""
    mixer: str
    ffn: str
    position: str
    """How attention knows positions; empty for recurrent layers."""
    window: int | None
    """How many last tokens attention sees; None: all."""
    parameters: int
    """The row's own, norms included."""
    flops: int
    """Forward and backward operations per token of training, averaged over the context."""
    state_bytes: int
    """What one sequence's keys, values and states take after the context, in bf16 and fp32."""


def picture(model: ModelConfig, context_len: int) -> list[LayerRow]:
    """The rows of a model: embedding, layers, head. Their parameters add up to the model's.

    A layer that is looped costs what all its passes cost.
    """
    built = weightless(model)
    rows = [_outer(built, "embedding", built.embedding_norm, built.embedding)]
    # two costs of every pass, in the order in which they run
    costs = [cost for _, cost in built.costs(context_len, VALUE_BYTES)]
    for layer, (name, block) in enumerate(zip(model.core.layers, layers_of(built), strict=True)):
        places = [place for place, one in enumerate(built.core.passes) if one == layer]
        own = [costs[2 * place + part] for place in places for part in (0, 1)]
        rows.append(_row(layer, name, model, block, own))
    if isinstance(built.core, Recursive | CanvasCore):
        title = "canvas"
        if isinstance(built.core, Recursive):
            title = f"{built.core.loops} loops"
        loops = _outer(built, title)
        count = built.core.own_parameters
        if isinstance(built, Canvas):
            count += built.own_parameters
        rows.append(loops._replace(parameters=count))
    # a tied head has no parameters of its own
    head = [built.head_norm] if model.head == "tied" else [built.head_norm, built.head]
    flops = training_flops(built, context_len)[HEAD]
    return [*rows, _outer(built, "head", *head)._replace(flops=flops)]


def decode_bytes(model: Model, context_len: int) -> int:
    """Bytes that are read for one token after a context, in bf16: weights once, states whole.

    Of the embedding one row is read; a tied one is read whole, as the head.
    """
    weights = weights_read(model, VALUE_BYTES)
    return weights + sum(state_bytes(model, context_len, VALUE_BYTES))


def _row(
    layer: int, name: str, model: ModelConfig, block: Block, costs: Sequence[Cost]
) -> LayerRow:
    config = model.core.blocks[name]
    attention = block.mixer if isinstance(block.mixer, Attention) else None
    return LayerRow(
        layer,
        name,
        config.mixer.type,
        config.ffn.type,
        attention.position.type if attention else "",
        attention.window if attention else None,
        _count(block),
        sum(cost.training_flops for cost in costs),
        sum(cost.state_bytes for cost in costs),
    )


def _outer(model: Model, name: str, *modules: nn.Module) -> LayerRow:
    return LayerRow(None, name, "", "", "", None, sum(map(_count, modules)), 0, 0)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
