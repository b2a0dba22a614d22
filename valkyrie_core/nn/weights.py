"""Weights in fewer bits: what is rounded, and the model that computes with it.

| format | hidden matrices and head | factors of low-rank maps | everything else |
|---|---|---|---|
| fp32 | as trained | as trained | as trained |
| bf16 | bf16 | bf16 | as trained |
| int8 | 8 bits, an fp32 scale per output | bf16 | as trained |

The factors are few, and they steer the recurrence: int8 would save little. The embedding is looked
up, not multiplied: it stays as trained, also where the head is tied to it.
"""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from valkyrie_core.kernels import decode as kernel
from valkyrie_core.nn.layers import Role, parameter_roles
from valkyrie_core.nn.model import HybridLM

Weights = Literal["fp32", "bf16", "int8"]
Precision = Literal["fp32", "bf16"]


def format_of(role: Role, weights: Weights) -> Weights:
    """The format of a parameter by its role."""
    if role in ("matrix", "head"):
        return weights
    if role == "low_rank" and weights != "fp32":
        return "bf16"
    return "fp32"


def rounded(model: HybridLM, weights: Weights, precision: Precision = "fp32") -> HybridLM:
    """A model with rounded matrices; it shares every other parameter with the one given, and is
    that one itself for fp32.

    Args:
        precision: how it is going to run. For bf16 autocast its matrices are stored in bf16 (which
            rounds those of int8 once more, as autocast would at every use).
    """
    if weights == "fp32":
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, dict(shared))
    roles = {**parameter_roles(model), "head.weight": "head"}
    for name, role in roles.items():
        form = format_of(role, weights)
        if form == "fp32":
            continue
        path, _, leaf = name.rpartition(".")
        module = new.get_submodule(path)
        values = kernel.rounded(model.get_parameter(name), form)
        if precision == "bf16":
            values = values.bfloat16()
        setattr(module, leaf, nn.Parameter(values, requires_grad=False))
    return new.eval()
