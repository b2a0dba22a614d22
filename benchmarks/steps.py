"""One training step, ours and a peer's: the same tokens, precision and optimizer for both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Call
from valkyrie_core.nn.model import HybridLM

LEARNING_RATE = 1e-4
LossCall = Callable[[Tensor], Tensor]
"""The mean loss of predicting each token of [B, T + 1] from those before it."""


def step(model: torch.nn.Module, loss: LossCall, windows_BT: Tensor, precision: str) -> Call:
    """Loss, gradients, and AdamW in one fused kernel; `precision` is bf16 (autocast) or fp32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16)
            if precision == "bf16"
            else contextlib.nullcontext()
        ):
            value = loss(windows_BT)
        torch.autograd.backward(value)
        optimizer.step()

    return call


def our_loss(model: HybridLM) -> LossCall:
    """The loss as training calls it."""
    return _loss_of(model, model.loss)


def our_compiled_loss(model: HybridLM) -> LossCall:
    """The same by way of torch.compile, as a recipe's `train.compile` does it."""
    return _loss_of(model, model.compiled_loss("default"))


def _loss_of(model: HybridLM, function: Callable[..., Any]) -> LossCall:
    def loss(windows_BT: Tensor) -> Tensor:
        state = model.init_state(windows_BT.shape[0])
        value: Tensor = function(windows_BT[:, :-1], windows_BT[:, 1:], state)[0]
        return value

    return loss


def llama_loss(model: Any) -> LossCall:
    """Hugging Face's own loss; it shifts the labels itself."""

    def loss(windows_BT: Tensor) -> Tensor:
        tokens_BT = windows_BT[:, :-1]
        value: Tensor = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        return value

    return loss


def llama_compiled_loss(model: Any) -> LossCall:
    """The same by way of torch.compile."""
    return llama_loss(torch.compile(model, dynamic=False))


def products(model: torch.nn.Module, tokens: int) -> Call:
    """The bf16 matrix products of a step over so many tokens, and nothing else.

    Per matrix three: the output, and the gradients of the input and of the matrix. What training
    could reach if all else took no time.
    """
    work = []
    for weight in model.parameters():
        if weight.dim() == 2 and min(weight.shape) > 1:
            rows, columns = weight.shape
            operands = (
                torch.randn(tokens, columns),
                weight.detach().clone(),
                torch.randn(tokens, rows),
            )
            work.append(tuple(x.bfloat16() for x in operands))

    @torch.no_grad()
    def call() -> None:
        for x, weight, y in work:
            x @ weight.T
            y @ weight
            y.T @ x

    return call
