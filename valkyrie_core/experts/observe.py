"""Watching routers at work: which experts every token of a text meets, and how sure they are.

Shapes: B windows at once, T time, R tokens, E experts, K slots of a token, C rounds of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from valkyrie_core.experts.measures import Choices, Ints
from valkyrie_core.experts.text import PADDING, Text
from valkyrie_core.nn.backbone import Told
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.moe.gates import SigmoidTopKConfig
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.state import Routed
from valkyrie_core.nn.weights import Precision

AT_ONCE = 4
"""Windows of a batch; never of two domains."""
Progress = Callable[[str, int, int], None]
"""What is read, the tokens read so far, and their total."""


class LayerTrace(NamedTuple):
    """What the routers of one layer did with every token."""

    experts_CRK: tuple[Choices, ...]
    """Of every round; -1 in a slot that is not used."""
    entropy: float
    """Of a token's affinities in nats, mean over tokens and rounds."""
    margin: float
    """The greatest affinity less the second one, mean likewise; affinities sum to 1."""

    @property
    def experts_RK(self) -> Choices:
        """The experts of all rounds."""
        return np.concatenate(self.experts_CRK, axis=1)


class Trace(NamedTuple):
    """What a model did with a text; padding is left out."""

    tokens_R: Ints
    window_R: Ints
    batch_R: Ints
    domain_W: Ints
    """The domain of every window."""
    layers: dict[int, LayerTrace]


class Batch(NamedTuple):
    """Windows that are read side by side, all of one domain."""

    domain: int
    first_window: int
    """Counted over all domains."""
    text: Text


def moe_layers(model: HybridLM) -> dict[int, MoE]:
    """The layers with experts, by their place in the stack."""
    return {
        index: layer.ffn
        for index, layer in enumerate(model.core.layers)
        if isinstance(layer.ffn, MoE)
    }


def batches(texts: Sequence[Text]) -> Iterator[Batch]:
    """All windows, a few at a time."""
    first = 0
    for domain, text in enumerate(texts):
        for start in range(0, len(text.tokens_WT), AT_ONCE):
            piece = (x_WT[start : start + AT_ONCE] for x_WT in text[1:])
            yield Batch(domain, first + start, Text(text.name, *piece))
        first += len(text.tokens_WT)


def reading(model: HybridLM, precision: Precision) -> AbstractContextManager[Any]:
    """How a model is read: as in training, without gradients."""
    device = model.embedding.weight.device
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def observe(
    model: HybridLM,
    texts: Sequence[Text],
    *,
    precision: Precision = "fp32",
    what: str = "text",
    told: Progress | None = None,
) -> Trace:
    """Reads every window once; `what` names the reading to `told`."""
    layers = moe_layers(model)
    passes = [index for index in model.core.passes if index in layers]
    # a layer that is looped routes in every loop
    choices: dict[int, list[list[Choices]]] = {
        index: [[] for _ in range(passes.count(index)) for _ in moe.routers]
        for index, moe in layers.items()
    }
    sureness = {index: np.zeros(2) for index in layers}
    tokens, windows, numbers, domains = [], [], [], []
    total = sum(text.num_tokens for text in texts)
    read = 0
    for number, batch in enumerate(batches(texts)):
        real_BT = batch.text.doc_WT != PADDING
        left = list(_routed(model, batch.text, precision).routed)
        rounds = {index: iter(own) for index, own in choices.items()}
        for index in passes:
            for _ in layers[index].routers:
                routed = left.pop(0)
                next(rounds[index]).append(_chosen(routed, real_BT.flatten()))
                sureness[index] += _sureness(layers[index], routed, real_BT.flatten())
        assert not left
        B, T = real_BT.shape
        window_BT = torch.arange(batch.first_window, batch.first_window + B)[:, None].expand(B, T)
        tokens.append(batch.text.tokens_WT[real_BT].numpy())
        windows.append(window_BT[real_BT].numpy())
        numbers.append(np.full(int(real_BT.sum()), number))
        domains += [batch.domain] * B
        read += int(real_BT.sum())
        if told is not None:
            told(what, read, total)
    return Trace(
        np.concatenate(tokens),
        np.concatenate(windows),
        np.concatenate(numbers),
        np.array(domains, dtype=np.int64),
        {
            index: LayerTrace(
                tuple(np.concatenate(own) for own in choices[index]),
                *(float(value) for value in sureness[index] / (read * len(choices[index]))),
            )
            for index in layers
        },
    )


def _routed(model: HybridLM, text: Text, precision: Precision) -> Told:
    device = model.embedding.weight.device
    state = model.init_state(len(text.tokens_WT))
    with torch.inference_mode(), reading(model, precision):
        # its logits come in chunks: a long window's would not fit
        _, _, told = model.loss(
            text.tokens_WT.to(device), text.targets_WT.to(device), state, text.doc_WT.to(device)
        )
    return told


def _chosen(routed: Routed, real_R: Tensor) -> Choices:
    """[R, K] of the real tokens."""
    experts_RK = routed.experts_RK.cpu()
    if routed.used_RK is not None:
        experts_RK = experts_RK.masked_fill(~routed.used_RK.cpu(), -1)
    chosen: Choices = experts_RK[real_R].to(torch.int16).numpy()
    return chosen


def _sureness(moe: MoE, routed: Routed, real_R: Tensor) -> Any:
    """Entropy and margin, summed over the real tokens."""
    logits_RE = routed.logits_RE.cpu()[real_R].double()
    if isinstance(moe.config.gate, SigmoidTopKConfig):
        affinity_RE = logits_RE.sigmoid()
        p_RE = affinity_RE / affinity_RE.sum(-1, keepdim=True)
    else:
        p_RE = logits_RE.softmax(-1)
    entropy = torch.special.entr(p_RE).sum()
    best_R2 = p_RE.topk(2, dim=-1).values
    return np.array([float(entropy), float((best_R2[:, 0] - best_R2[:, 1]).sum())])
