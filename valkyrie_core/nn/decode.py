"""A model as decoding wants it: its weights in one format, one native call per sub-layer.

Windows of tokens run through the modules, single tokens through fused steps where there are any;
both carry the same states, so they continue each other freely.

Shapes: B batch, T time, D model, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from valkyrie_core.kernels.arena import Arena
from valkyrie_core.kernels.build import BuildError
from valkyrie_core.kernels.decode import MAX_BATCH, Queue
from valkyrie_core.kernels.guard import expect
from valkyrie_core.nn.block import Block, Stack
from valkyrie_core.nn.decode_native import Step
from valkyrie_core.nn.decode_steps import EmbeddingStep, HeadStep, fused
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import Ctx, LMState
from valkyrie_core.nn.storage_type import call
from valkyrie_core.nn.weights import Precision, Weights, rounded

log = logging.getLogger("valkyrie")
_CHANGES = attrgetter("_version")
"""How often a tensor was changed in place."""
_announced: set[str] = set()


class ModuleStep:
    """A sub-layer without a native step: the modules themselves, for one token."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, precision: Precision) -> None:
        self.norm, self.mixer, self.precision = norm, mixer, precision

    def __call__(self, x_BD: Tensor, state: Any, ctx: Ctx, queue: Queue) -> tuple[Tensor, Any, Ctx]:
        """See `Step`."""
        queue.run()
        with _autocast(x_BD.device, self.precision):
            y_BTD, state, ctx = call(self.mixer, self.norm(x_BD[:, None]), state, ctx)
        return x_BD + y_BTD[:, 0], state, ctx


class _Steps(NamedTuple):
    """A model as steps."""

    embed: EmbeddingStep
    layers: list[tuple[Step, Step]]
    head: HeadStep


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
        # matrices that are stored in bf16 are bf16 as trained: fp32 would be the same values
        narrow = weights == "fp32" and model.matrices == torch.bfloat16
        self.weights: Weights = "bf16" if narrow else weights
        self.precision = precision
        self._given = model
        self._parameters = list(model.parameters())
        # what was made in inference mode counts no changes, and can't be trained
        self._counting = [x for x in (*self._parameters, *model.buffers()) if not x.is_inference()]
        self._changes = self._count_changes()
        self._places = [parameter.data_ptr() for parameter in self._parameters]
        self.model = rounded(model, self.weights, precision)
        self._steps: _Steps | None = None
        self._packed = False

    def is_current(self, *, changes_only: bool = False) -> bool:
        """Whether the model has the weights that it had.

        Args:
            changes_only: only looks for changes in place, some microseconds; else also whether a
                parameter was put in another's place.
        """
        if self._count_changes() != self._changes:
            return False
        if changes_only:
            return True
        now = list(self._given.parameters())
        same = len(now) == len(self._parameters) and all(map(is_, now, self._parameters))
        return same and [parameter.data_ptr() for parameter in now] == self._places

    def _count_changes(self) -> int:
        # counters only grow: their sum stays while none has moved
        return int(sum(map(_CHANGES, self._counting))) + _optimizer_steps().count

    def read(
        self, tokens_BT: Tensor, state: LMState, doc_BT: Tensor | None, index_B: Tensor
    ) -> tuple[Tensor, LMState]:
        """Reads a window: the logits [B, V] after the token at `index_B` of each row, the state."""
        with _autocast(tokens_BT.device, self.precision):
            x_BTD, state, _ = self.model._hidden(tokens_BT, state, doc_BT)
            rows_B = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)
            logits_BV = self.model.head(x_BTD[rows_B, index_B])
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)), state

    def token_losses(
        self, tokens_BT: Tensor, targets_BT: Tensor, state: LMState
    ) -> tuple[Tensor, LMState]:
        """Reads a window: the loss [B, T] of every target as `HybridLM.token_losses`, the state."""
        with _autocast(tokens_BT.device, self.precision):
            return self.model.token_losses(tokens_BT, targets_BT, state)

    def takes_steps(self, num_rows: int) -> bool:
        """Whether single tokens of so many rows run in native steps."""
        if not self._packed:
            self._packed, self._steps = True, self._pack()
        return self._steps is not None and num_rows <= MAX_BATCH

    def step(self, tokens_B: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Reads one token per row, each going on with its document: logits [B, V], the state.

        Raises:
            IndexError: a token outside of the vocabulary.
        """
        if not self.takes_steps(tokens_B.shape[0]) or self._steps is None:
            return self.read(tokens_B[:, None], state, None, torch.zeros_like(tokens_B))
        # native steps are given pointers: nothing of another size may reach them
        expect("the tokens", tokens_B, state.pos_B.shape)
        # what `enter` makes of a window of one token
        ctx = Ctx(pos_BT=state.pos_B[:, None], segment_BT=state.segment_B[:, None])
        x_BD = self._steps.embed(tokens_B.long())
        queue, layers = Queue(tokens_B.shape[0]), []
        for (mix, ffn), (mixer_state, ffn_state) in zip(
            self._steps.layers, state.layers, strict=True
        ):
            x_BD, mixer_state, ctx = mix(x_BD, mixer_state, ctx, queue)
            x_BD, ffn_state, ctx = ffn(x_BD, ffn_state, ctx, queue)
            layers.append((mixer_state, ffn_state))
        state = state._replace(layers=tuple(layers), pos_B=state.pos_B + 1)
        logits_BV = self._steps.head(x_BD, queue)
        queue.run()
        return logits_BV, state

    def _pack(self) -> _Steps | None:
        """The steps of all layers; None where the model as a whole has to run."""
        core, own = self._given.core, self.model.core
        norm = next(self._given.head_norm.parameters())
        if norm.device.type != "cpu" or norm.dtype != torch.float32:
            return None
        if not isinstance(core, Stack) or not isinstance(own, Stack):
            _announce("there are no native steps for looped blocks")
            return None
        if self._given.config.core.type == "stack" and self._given.config.core.feedback:
            _announce("there are no native steps for layers that hear each other")
            return None
        arena = Arena()
        layers = []
        try:
            for layer, rounded_layer in zip(core.layers, own.layers, strict=True):
                assert isinstance(layer, Block)
                assert isinstance(rounded_layer, Block)
                layers.append(self._pack_block(layer, rounded_layer, arena))
            embed = EmbeddingStep(self._given)
            return _Steps(embed, layers, HeadStep(self._given, self.weights, arena))
        except BuildError as error:
            _announce(str(error))
            return None

    def _pack_block(self, block: Block, own: Block, arena: Arena) -> tuple[Step, Step]:
        # native steps round what was trained themselves: rounding twice is not rounding once
        mix = fused(block.mixer_norm, block.mixer, self.weights, arena)
        ffn = fused(block.ffn_norm, block.ffn, self.weights, arena)
        for step, module in ((mix, block.mixer), (ffn, block.ffn)):
            if step is None:
                _announce(f"there is no native step for this {type(module).__name__}")
        return (
            mix or ModuleStep(own.mixer_norm, own.mixer, self.precision),
            ffn or ModuleStep(own.ffn_norm, own.ffn, self.precision),
        )


class _Count:
    """How often something happened."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, *_: object) -> None:
        """Once more."""
        self.count += 1


@functools.cache
def _optimizer_steps() -> _Count:
    """Counts the steps of all optimizers from now on: fused ones do not count as changes."""
    steps = _Count()
    register_optimizer_step_post_hook(steps.add)
    return steps


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _announce(reason: str) -> None:
    if reason not in _announced:
        _announced.add(reason)
        log.warning(
            "decoding runs through PyTorch modules, several times slower than native code: %s",
            reason,
        )
