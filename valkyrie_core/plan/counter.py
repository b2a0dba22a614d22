"""The operations of a real training step, counted one by one with torch's FlopCounterMode.

It knows matrix products and our own operators, but not the attention that torch runs on a CPU in
fp32; its formulas stand here. Causal attention counts the pairs that are seen, half of the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.train.device import autocast

_aten = torch.ops.aten


def _pairs(q_shape: Any, k_shape: Any, is_causal: bool) -> int:
    B, N, T, _ = q_shape
    S = k_shape[2]
    return int(B * N * (T * (T + 1) // 2 if is_causal else T * S))


def _forward(
    q_shape: Any, k_shape: Any, v_shape: Any, dropout: float = 0.0, is_causal: bool = False,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Scores and values."""
    return 2 * 2 * _pairs(q_shape, k_shape, is_causal) * int(q_shape[-1])


def _backward(
    dy_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, y_shape: Any, lse_shape: Any,
    dropout: float, is_causal: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """The scores again, and the gradients of weights, queries, keys and values."""
    return 5 * 2 * _pairs(q_shape, k_shape, is_causal) * int(q_shape[-1])


FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


_ALL = {
    **flop_registry,
    **{packet: shape_wrapper(f) for packet, f in FORMULAS.items()},  # type: ignore[no-untyped-call]
}


def operation_flops(operator: Any, args: Any, kwargs: Any, out: Any) -> int:
    """What one call of an operator computes in matrix products and recurrences."""
    formula = _ALL.get(operator.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def count_step(model: HybridLM, tokens_BT: Tensor, precision: Precision) -> int:
    """Operations of forward and backward over a batch that is one document per row."""
    state = model.init_state(len(tokens_BT))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        with autocast(precision, tokens_BT.device):
            loss, _, _ = model.loss(tokens_BT, tokens_BT, state)
        torch.autograd.backward(loss)
    model.zero_grad()
    return int(counter.get_total_flops())
