"""A model as decoding wants it: its weights in one format, one native call per sub-layer.

Windows of tokens run through the modules, single tokens through fused steps where there are any;
both carry the same states, so they continue each other freely.

Shapes: B batch, T time, D model, V vocabulary.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from valkyrie_core.kernels.arena import Arena
from valkyrie_core.kernels.build import BuildError
from valkyrie_core.kernels.decode import MAX_BATCH
from valkyrie_core.nn.block import Block, Stack
from valkyrie_core.nn.decode_steps import EmbeddingStep, HeadStep, Step, fused
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import Ctx, LMState, Mixer
from valkyrie_core.nn.weights import Precision, Weights, rounded

log = logging.getLogger("valkyrie")
_announced: set[str] = set()


class ModuleStep:
    """A sub-layer without a native step: the modules themselves, for one token."""

    def __init__(self, norm: nn.Module, mixer: Mixer, precision: Precision) -> None:
        self.norm, self.mixer, self.precision = norm, mixer, precision

    def __call__(self, x_BD: Tensor, state: Any, ctx: Ctx) -> tuple[Tensor, Any, Ctx]:
        """See `Step`."""
        with _autocast(x_BD.device, self.precision):
            y_BTD, state, ctx = self.mixer(self.norm(x_BD[:, None]), state, ctx)
        return x_BD + y_BTD[:, 0], state, ctx


class Decoder:
    """Reads windows and single tokens with the weights that the model had when this was made.

    `is_current` tells whether the model still has them; training changes them in place.
    """

    def __init__(
        self, model: HybridLM, weights: Weights = "fp32", *, precision: Precision = "fp32"
    ) -> None:
        """
        Args:
            weights: the format of matrices; see `nn/weights.py`. fp32: exactly what was trained.
            precision: of the matrix products over windows; bf16 runs them under autocast.
        """
        self.weights, self.precision = weights, precision
        self._given = model
        self._parameters = list(model.parameters())
        self._versions = [_version(parameter) for parameter in self._parameters]
        self.model = model if weights == "fp32" else rounded(model, weights, precision)
        self._layers: list[tuple[Step, Step]] = []
        self._embed: EmbeddingStep | None = None
        self._head: HeadStep | None = None
        weight = model.embedding.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            try:
                self._pack(model)
            except BuildError as error:
                self._layers, self._embed, self._head = [], None, None
                _announce(str(error))

    def _pack(self, model: HybridLM) -> None:
        core = self.model.core
        if not isinstance(core, Stack):
            return
        arena = Arena()
        for layer, own in zip(model.core.layers, core.layers, strict=True):
            if not isinstance(layer, Block) or not isinstance(own, Block):
                return
            # native steps pack what was trained: rounding twice would not be rounding once
            self._layers.append(
                (
                    fused(layer.mixer_norm, layer.mixer, self.weights, arena)
                    or ModuleStep(own.mixer_norm, own.mixer, self.precision),
                    fused(layer.ffn_norm, layer.ffn, self.weights, arena)
                    or ModuleStep(own.ffn_norm, own.ffn, self.precision),
                )
            )
        self._embed, self._head = EmbeddingStep(model), HeadStep(model, self.weights, arena)

    def is_current(self, *, same_parameters: bool = False) -> bool:
        """Whether the model has the weights of this decoder.

        Args:
            same_parameters: looks only at the parameters that the model had, which is faster: none
                was put in another's place.
        """
        if not same_parameters:
            now = list(self._given.parameters())
            if len(now) != len(self._parameters) or any(
                one is not other for one, other in zip(now, self._parameters, strict=True)
            ):
                return False
        return [_version(parameter) for parameter in self._parameters] == self._versions

    def read(
        self, tokens_BT: Tensor, state: LMState, doc_BT: Tensor | None, index_B: Tensor
    ) -> tuple[Tensor, LMState]:
        """Reads a window: the logits [B, V] after the token at `index_B` of each row, the state."""
        with _autocast(tokens_BT.device, self.precision):
            x_BTD, state = self.model._hidden(tokens_BT, state, doc_BT)
            rows_B = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)
            logits_BV = self.model.head(x_BTD[rows_B, index_B])
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)), state

    def step(self, tokens_B: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Reads one token per row, each going on with its document: logits [B, V], the state."""
        B = tokens_B.shape[0]
        if self._embed is None or self._head is None or B > MAX_BATCH:
            return self.read(tokens_B[:, None], state, None, torch.zeros_like(tokens_B))
        # what `enter` makes of a window of one token
        ctx = Ctx(pos_BT=state.pos_B[:, None], segment_BT=state.segment_B[:, None])
        x_BD = self._embed(tokens_B)
        layers = []
        for (mix, ffn), (mixer_state, ffn_state) in zip(self._layers, state.layers, strict=True):
            x_BD, mixer_state, ctx = mix(x_BD, mixer_state, ctx)
            x_BD, ffn_state, ctx = ffn(x_BD, ffn_state, ctx)
            layers.append((mixer_state, ffn_state))
        return self._head(x_BD), state._replace(layers=tuple(layers), pos_B=state.pos_B + 1)


def _version(parameter: Tensor) -> tuple[int, int]:
    """Changes with every change in place."""
    # a tensor made in inference mode counts no versions; it can't be trained either
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _announce(reason: str) -> None:
    if reason not in _announced:
        _announced.add(reason)
        log.warning(
            "decoding runs through PyTorch modules, several times slower than native code: %s",
            reason,
        )
