"""Text that a router is watched on: windows of several domains, spread evenly over each.

Shapes: W windows, T time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.tokenizer import NUM_RESERVED, SPECIAL_TOKENS, Tokenizer
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.model import IGNORED

LEAST_WINDOWS = 16
"""Windows of a domain are shortened until there are so many, where its tokens allow."""
SHORTEST = 32
"""Tokens that a window is not shortened below."""
PADDING = -1


class Source(NamedTuple):
    """The whole text of a domain."""

    name: str
    tokens: npt.NDArray[Any]
    doc_starts: npt.NDArray[np.int64]
    """Where documents begin; last the length of the text."""
    scored: npt.NDArray[np.uint8] | None = None
    """1 where a token is to be predicted; None: everywhere."""


class Text(NamedTuple):
    """Windows of one domain."""

    name: str
    tokens_WT: Tensor
    targets_WT: Tensor
    """What comes next; IGNORED where nothing is scored: markers, padding."""
    doc_WT: Tensor
    """Document ids, -1 for padding."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are read."""
        return int((self.doc_WT != PADDING).sum())

    @property
    def num_documents(self) -> int:
        """Documents that they are from."""
        return len(np.unique(self.doc_WT[self.doc_WT != PADDING].numpy()))


def of_split(name: str, split: PackedSplit) -> Source:
    """The text of one split of a corpus."""
    return Source(name, split.tokens, split.doc_starts, split.scored)


def of_document(name: str, tokens_T: npt.NDArray[np.int64]) -> Source:
    """One document, its marker first."""
    return Source(name, tokens_T, np.array([0, len(tokens_T)], dtype=np.int64))


def window_length(context_len: int, tokens: int) -> int:
    """The context's length, or less where few tokens would make too few windows."""
    return min(context_len, tokens, max(SHORTEST, tokens // LEAST_WINDOWS))


def cut(source: Source, length: int, tokens: int) -> Text:
    """At most `tokens` tokens, in windows of `length` that do not overlap.

    A text that is shorter than one window is one window, padded. Raises UsageError where there is
    nothing to predict.
    """
    # the last token is predicted, not read
    readable = len(source.tokens) - 1
    if readable < 1:
        raise UsageError(f"{source.name} has no token that could be predicted")
    starts = np.arange(0, max(1, readable - length + 1), length)
    count = min(len(starts), max(1, tokens // length))
    picked = starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]
    shape = (count, length)
    tokens_WT = np.zeros(shape, dtype=np.int64)
    targets_WT = np.full(shape, IGNORED, dtype=np.int64)
    doc_WT = np.full(shape, PADDING, dtype=np.int64)
    for row, start in enumerate(picked):
        end = min(int(start) + length, readable)
        ids = np.asarray(source.tokens[start : end + 1]).astype(np.int64)
        wanted = ids[1:] >= NUM_RESERVED
        if source.scored is not None:
            wanted &= np.asarray(source.scored[start + 1 : end + 1]) != 0
        width = end - start
        tokens_WT[row, :width] = ids[:-1]
        targets_WT[row, :width] = np.where(wanted, ids[1:], IGNORED)
        # ids that are no padding: the first document is 1
        doc_WT[row, :width] = np.searchsorted(
            source.doc_starts, np.arange(start, end), side="right"
        )
    return Text(source.name, *(torch.from_numpy(x) for x in (tokens_WT, targets_WT, doc_WT)))


def part(text: Text, count: int) -> Text:
    """At most `count` of its windows, spread evenly."""
    windows = len(text.tokens_WT)
    picked = np.linspace(0, windows - 1, min(count, windows)).round().astype(int)
    index = torch.from_numpy(picked)
    return Text(text.name, text.tokens_WT[index], text.targets_WT[index], text.doc_WT[index])


def shown(tokenizer: Tokenizer, token: int) -> str:
    r"""A token for people: markers by name, what can't be printed escaped, as `\n` or `\xff`."""
    if token < NUM_RESERVED:
        return SPECIAL_TOKENS[token - 1] if token else "<unk>"
    text = tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
