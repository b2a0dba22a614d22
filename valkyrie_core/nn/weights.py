"""Weights in fewer bits: what is rounded, and the model that computes with it.

| format | hidden matrices, factors of low-rank maps, head | everything else |
|---|---|---|
| fp32 | as trained | as trained |
| bf16 | bf16 | as trained |
| int8 | 8 bits, an fp32 scale per output | as trained |

The embedding is looked up, not multiplied: it stays as trained, also where the head is tied to it.
"""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

import torch
from torch import nn

from valkyrie_core.kernels import decode as kernel
from valkyrie_core.nn.backbone import Backbone
from valkyrie_core.nn.layers import Role, parameter_roles

Weights = Literal["fp32", "bf16", "int8"]
Precision = Literal["fp32", "bf16"]


ROUNDED: frozenset[Role] = frozenset({"matrix", "low_rank", "head"})
"""What is multiplied by."""


AnyModel = TypeVar("AnyModel", bound=Backbone)


def rounded(model: AnyModel, weights: Weights, precision: Precision = "fp32") -> AnyModel:
    """A model with rounded matrices; it shares every other parameter with the one given, and is
    that one itself for fp32.

    Args:
        precision: how it is going to run. For bf16 autocast its matrices are stored in bf16 (which
            rounds those of int8 once more, as autocast would at every use); so are they where the
            given ones are.
    """
    if weights == "fp32" or (weights == "bf16" and model.matrices == torch.bfloat16):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, dict(shared))
    roles = {**parameter_roles(model), "head.weight": "head"}
    for name, role in roles.items():
        if role not in ROUNDED:
            continue
        path, _, leaf = name.rpartition(".")
        module = new.get_submodule(path)
        given = model.get_parameter(name)
        # a factor is stored by inputs, a matrix by outputs
        values = (
            kernel.rounded(given.T, weights).T
            if role == "low_rank"
            # experts are stacked: every row has a scale of its own
            else kernel.rounded(given.flatten(0, -2), weights).view_as(given)
        )
        if precision == "bf16" or given.dtype == torch.bfloat16:
            values = values.bfloat16()
        setattr(module, leaf, nn.Parameter(values.contiguous(), requires_grad=False))
    return new.eval()
