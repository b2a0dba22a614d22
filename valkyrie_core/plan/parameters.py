"""How many parameters a model has, part by part, without building their numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import Block
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.canvas_core import CanvasCore
from valkyrie_core.nn.models import Model, build_model
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.routers import undecided


class Parameters(NamedTuple):
    """Counts of parameters; tied ones count once."""

    total: int
    active: int
    """Those that a token meets: of experts as many as it has slots."""
    by_part: dict[str, int]
    """Embedding, head (0 where it is tied), norms between the mixers, every type of mixer, and what
    belongs to loops."""


def weightless(config: ModelConfig) -> Model:
    """The model with shapes and no numbers: instant, whatever its size."""
    with torch.device("meta"):
        return undecided(build_model(config))


def count_parameters(model: Model) -> Parameters:
    """The parameters of a model, weightless or not."""
    tied = model.head.weight is model.embedding.weight
    parts = {
        "embedding": _size(model.embedding),
        "head": 0 if tied else _size(model.head),
        "norms": _size(model.embedding_norm) + _size(model.head_norm),
    }
    for layer, (mixer, ffn) in zip(model.core.layers, model.core.types, strict=True):
        assert isinstance(layer, Block)
        parts["norms"] += _size(layer.mixer_norm) + _size(layer.ffn_norm)
        parts[mixer] = parts.get(mixer, 0) + _size(layer.mixer)
        parts[ffn] = parts.get(ffn, 0) + _size(layer.ffn)
        if layer.heard_parameters:
            parts["feedback"] = parts.get("feedback", 0) + layer.heard_parameters
    if isinstance(model.core, Recursive | CanvasCore):
        parts["loops"] = model.core.own_parameters
    if isinstance(model, Canvas):
        parts["canvas"] = model.own_parameters
    total = model.num_parameters()
    passed_over = sum(moe.idle_parameters for moe in model.modules() if isinstance(moe, MoE))
    return Parameters(total=total, active=total - passed_over, by_part=parts)


def unrolled_parameters(model: Model) -> int:
    """Parameters if every pass of a looped layer were a layer with weights of its own."""
    passes = list(model.core.passes)
    again = sum(
        _size(layer) * (passes.count(index) - 1) for index, layer in enumerate(model.core.layers)
    )
    return model.num_parameters() + again


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
