"""Which layers a trained model leans on: what its predictions become when one of them is changed.

One layer at a time, attention sees a window only, or the mixer's output is zero. The distance is
KL(original || changed) of the next token's distribution on held-out text. An attention layer that a
window hardly changes does its work nearby, and is the first that could become recurrent.

Shapes: B windows at once, W windows, T time, D model, V vocabulary, R positions at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from valkyrie_core.allocate.match import layers_of
from valkyrie_core.data.dataset import Dataset
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.attention import Attention
from valkyrie_core.nn.block import Block
from valkyrie_core.nn.model import LOGITS_AT_ONCE, HybridLM
from valkyrie_core.nn.state import Ctx

Change = Literal["windowed", "removed"]
WINDOWS = 32
"""Windows of text, spread evenly over the held-out texts."""
SINKS = 4
"""First tokens that windowed attention keeps in sight."""
AT_ONCE = 4
RESAMPLES = 2000


class Windows(NamedTuple):
    """Text to predict."""

    tokens_WT: Tensor
    doc_WT: Tensor


class Importance(NamedTuple):
    """What one change of one layer does."""

    layer: int
    change: Change
    kl: float
    """Nats per token, mean."""
    low: float
    """Of the 95 % interval, by a bootstrap over the windows."""
    high: float


class Silenced(nn.Module):
    """A mixer whose output is zero; what later layers take from it in `ctx` stays."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def init_state(self, *args: Any, **kwargs: Any) -> Any:
        """As the mixer's."""
        return self.mixer.init_state(*args, **kwargs)  # type: ignore[operator]

    def forward(self, x_BTD: Tensor, state: Any, ctx: Ctx) -> tuple[Tensor, Any, Ctx]:
        """Zeros."""
        y_BTD, state, ctx = self.mixer(x_BTD, state, ctx)
        return torch.zeros_like(y_BTD), state, ctx


def text_windows(dataset: Dataset, context_len: int, count: int = WINDOWS) -> Windows:
    """Windows of held-out text, the same share of each corpus's length, none of them overlapping.

    Raises UsageError where there is not enough text for one.
    """
    tokens, docs = [], []
    splits = [corpus.validation for corpus in dataset.corpora.values()]
    places = [
        (split, start)
        for split in splits
        for start in range(0, len(split.tokens) - context_len + 1, context_len)
    ]
    if not places:
        raise UsageError(f"no held-out text has {context_len} tokens")
    picked = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    for split, start in (places[i] for i in picked):
        positions = np.arange(start, start + context_len)
        tokens.append(np.asarray(split.tokens[positions]).astype(np.int64))
        docs.append(np.searchsorted(split.doc_starts, positions, side="right").astype(np.int64))
    return Windows(torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(docs)))


def measure(
    model: HybridLM,
    text: Windows,
    *,
    window: int,
    told: Callable[[str, int, int], None] | None = None,
) -> list[Importance]:
    """Every layer with its mixer removed, and every attention layer with a window.

    The model is as before when this returns, or raises. Layers whose own window is no wider are
    left out. Raises UsageError where the window is no shorter than the text's windows.
    """
    context_len = text.tokens_WT.shape[1]
    if not 1 <= window < context_len:
        raise UsageError(f"--window {window} changes nothing in windows of {context_len} tokens")
    plan: list[tuple[int, Change]] = []
    for layer, block in enumerate(layers_of(model)):
        mixer = block.mixer
        if isinstance(mixer, Attention) and (mixer.window is None or mixer.window > window):
            plan.append((layer, "windowed"))
        plan.append((layer, "removed"))
    kl_PW = np.zeros((len(plan), len(text.tokens_WT)))
    for start in range(0, len(text.tokens_WT), AT_ONCE):
        piece = Windows(*(x_WT[start : start + AT_ONCE] for x_WT in text))
        original_BTD = _hidden(model, piece)
        for row, (layer, change) in enumerate(plan):
            with changed(layers_of(model)[layer], change, window):
                other_BTD = _hidden(model, piece)
            kl_BT = divergence(model, original_BTD, other_BTD)
            kl_PW[row, start : start + AT_ONCE] = kl_BT.mean(1).cpu().numpy()
        if told is not None:
            told("windows", min(start + AT_ONCE, len(text.tokens_WT)), len(text.tokens_WT))
    return [
        Importance(layer, change, float(kl_W.mean()), *bootstrap(kl_W))
        for (layer, change), kl_W in zip(plan, kl_PW, strict=True)
    ]


@contextmanager
def changed(block: Block, change: Change, window: int) -> Iterator[None]:
    """The block with another mixer, of the same weights, until the end of the context."""
    original = block.mixer
    if change == "removed":
        block.mixer = Silenced(original)  # type: ignore[assignment]
    else:
        assert isinstance(original, Attention)
        # a shallow copy: the weights are shared, the window is its own
        narrow = copy.copy(original)
        narrow.limit(window, SINKS)
        block.mixer = narrow
    try:
        yield
    finally:
        block.mixer = original


def bootstrap(values_W: npt.NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, resampling the values."""
    generator = np.random.default_rng(seed)
    picks_RW = generator.integers(len(values_W), size=(RESAMPLES, len(values_W)))
    low, high = np.quantile(values_W[picks_RW].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def divergence(model: HybridLM, original_BTD: Tensor, other_BTD: Tensor) -> Tensor:
    """[B, T] KL(original || other) in nats of the next token, from what the head is given.

    Some positions at a time: all of their probabilities would be gigabytes.
    """
    rows = max(1, LOGITS_AT_ONCE // model.head.out_features)
    split = (torch.split(x_BTD.flatten(0, 1), rows) for x_BTD in (original_BTD, other_BTD))
    pairs = zip(*split, strict=True)
    pieces = []
    with torch.inference_mode():
        for pair in pairs:
            ours_RV, theirs_RV = (model.head(x_RD).float().log_softmax(-1) for x_RD in pair)
            pieces.append((ours_RV.exp() * (ours_RV - theirs_RV)).sum(-1))
    return torch.cat(pieces).view(original_BTD.shape[:2])


def _hidden(model: HybridLM, text: Windows) -> Tensor:
    """[B, T, D]: what the head is given."""
    device = model.embedding.weight.device
    with torch.inference_mode():
        state = model.init_state(len(text.tokens_WT))
        x_BTD, _, _ = model._hidden(text.tokens_WT.to(device), state, text.doc_WT.to(device))
        return x_BTD
