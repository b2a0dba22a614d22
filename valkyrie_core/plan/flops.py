"""Floating-point operations of training and decoding, by type of mixer, from the mixers' formulas.

What is counted: matrix products and recurrences, the two operations of a multiplication and an
addition each; nothing elementwise. `plan/counter.py` counts the same by running a step.
"""

from __future__ import annotations

from typing import Any

from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.halting import Confidence
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.routed import RoutedMixer
from valkyrie_core.nn.state import Mixer
from valkyrie_core.plan.parameters import count_parameters

HEAD = "head"


def training_flops(model: Model, context_len: int) -> dict[str, int]:
    """Forward and backward per token, as computed, by type of mixer; the head comes last.

    What activation checkpointing computes again is not in it.
    """
    found: dict[str, int] = {}
    for kind, cost in model.costs(context_len):
        found[kind] = found.get(kind, 0) + cost.training_flops
    # the logits, and the gradients of the inputs and of the weights
    found[HEAD] = 3 * 2 * model.head.weight.numel()
    if isinstance(model.core, Recursive) and model.core.loop_loss:
        # it reads after every loop
        found[HEAD] *= model.core.loops
    if isinstance(model.core, Recursive) and isinstance(model.core.halting, Confidence):
        # and once more, without gradients: a confidence learns whether more loops say the same
        found[HEAD] += model.core.loops * 2 * model.head.weight.numel()
    return found


def decoding_flops(model: Model, context_len: int) -> dict[str, int]:
    """The last token of a context, all others read before, by type of mixer; the head last."""
    found: dict[str, int] = {}
    for kind, cost in model.costs(context_len):
        found[kind] = found.get(kind, 0) + cost.decode_flops
    found[HEAD] = 2 * model.head.weight.numel()
    return found


def state_bytes(model: Model, context_len: int, value_bytes: int = 4) -> tuple[int, int]:
    """What is remembered of one sequence after a context: (KV caches, recurrent states).

    Args:
        value_bytes: of one number; a wkv matrix stays in fp32.
    """
    caches, recurrent = 0, 0
    if isinstance(model, Canvas):
        # it remembers nothing from one question to the next
        return caches, recurrent
    # a mixer's state tells what it is, so that no list of types has to be kept here
    states = model.init_state(1).layers
    for block, pass_states in zip(model.blocks(), states, strict=True):
        for part, state in zip((block.mixer, block.ffn), pass_states, strict=True):
            for inner, own in _parts(part, state):
                size = inner.cost(context_len, value_bytes).state_bytes
                if _grows(own):
                    caches += size
                else:
                    recurrent += size
            if isinstance(part, RoutedMixer):
                recurrent += part.score_bytes(value_bytes)
    return caches, recurrent


def _parts(mixer: Mixer, state: Any) -> list[tuple[Mixer, Any]]:
    """A mixer with its state; of a router all of its mixers."""
    if not isinstance(mixer, RoutedMixer):
        return [(mixer, state)]
    return list(zip(mixer.each, mixer.states_of(state), strict=True))


def _grows(state: Any) -> bool:
    """Whether a mixer's state is made of caches."""
    if isinstance(state, KVState):
        return True
    several = isinstance(state, tuple) and not hasattr(state, "_fields")
    return several and any(map(_grows, state))


def weights_read(model: Model, value_bytes: int = 4) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding's other rows, and the
    experts that it does not meet."""
    count = count_parameters(model).active
    if model.head.weight is not model.embedding.weight:
        count -= model.embedding.weight.numel() - model.embedding.embedding_dim
    return value_bytes * count
