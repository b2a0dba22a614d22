"""What a number of bits per byte is worth: predictors that anyone can run.

| baseline | what it is |
|---|---|
| uniform | every byte equally likely: 8 |
| unigram | byte frequencies of the training text, one added to each count |
| xz | the validation text compressed alone |
| xz_given_training | how much longer the compressed training text gets with it behind |

Where only a part of a document is scored (the answers of a chat), validation text means that part,
joined; `xz_given_training` has read whole training documents, the unigram their scored parts.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence

import numpy as np

from valkyrie_core.config import Config
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.tokenizer import Tokenizer

MIB = 1 << 20
TOKENS_AT_ONCE = 1 << 22
"""Tokens counted at once: 32 MiB."""


class XzScore(Config):
    """Bits per byte of xz at its strongest, and on how much text it was measured."""

    bpb: float
    """Bits per byte of the validation text that was compressed."""
    validation_bytes: int
    """Bytes of validation text compressed."""
    validation_bytes_total: int
    """Bytes of validation text that there are."""
    training_bytes: int
    """Bytes of training text read before it; 0 for xz alone."""
    training_bytes_total: int
    """Bytes of training text that there are; more than were read where a limit cut them."""


class Baselines(Config):
    """Bits per byte of simple predictors on the validation text of one corpus."""

    uniform: float
    """Every byte equally likely."""
    unigram: float
    """Byte frequencies of the training text."""
    xz: XzScore
    """xz on the validation text alone."""
    xz_given_training: XzScore
    """xz after it has read the training text."""


def unigram_bits_per_byte(
    training: np.ndarray[tuple[int], np.dtype[np.int64]],
    validation: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> float:
    """Cross-entropy of the validation bytes under the training bytes' frequencies, add-one.

    Args:
        training: how often each of the 256 byte values occurs.
        validation: the same for the validation text.

    Raises:
        ValueError: no validation text.
    """
    total = int(validation.sum())
    if total == 0:
        raise ValueError("there is no validation text")
    smoothed = training + 1
    bits = -np.log2(smoothed / smoothed.sum())
    return float((validation * bits).sum() / total)


def xz_bits_per_byte(validation: bytes, training: bytes = b"") -> float:
    """8 x (size(training + validation) - size(training)) / bytes of validation text.

    Takes about a second per MiB and eleven bytes of memory per byte of text.

    Raises:
        ValueError: no validation text.
    """
    if not validation:
        raise ValueError("there is no validation text")
    read = compressed_size(training) if training else 0
    return 8 * (compressed_size(training + validation) - read) / len(validation)


def compressed_size(text: bytes) -> int:
    """Bytes of an .xz file (preset 9 extreme) whose dictionary holds the whole text."""
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": max(64 * 1024, len(text)),
        }
    ]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


def measure_baselines(
    training: PackedSplit,
    validation: PackedSplit,
    tokenizer: Tokenizer,
    *,
    max_training_bytes: int = 16 * MIB,
    max_validation_bytes: int = 4 * MIB,
) -> Baselines:
    """Every baseline on one corpus, from its packed tokens.

    xz reads at most the first bytes that the limits allow, and its scores say how many; the other
    baselines read everything.

    Raises:
        ValueError: no validation text.
    """
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    learned = byte_counts(training, pieces, scored_only=True)
    held_out = byte_counts(validation, pieces, scored_only=True)
    text = first_bytes(validation, pieces, max_validation_bytes, scored_only=True)
    read = first_bytes(training, pieces, max_training_bytes, scored_only=False)
    sizes = {"validation_bytes": len(text), "validation_bytes_total": int(held_out.sum())}
    total = int(byte_counts(training, pieces, scored_only=False).sum())
    return Baselines(
        uniform=math.log2(256),
        unigram=unigram_bits_per_byte(learned, held_out),
        xz=XzScore(
            bpb=xz_bits_per_byte(text), training_bytes=0, training_bytes_total=total, **sizes
        ),
        xz_given_training=XzScore(
            bpb=xz_bits_per_byte(text, read),
            training_bytes=len(read),
            training_bytes_total=total,
            **sizes,
        ),
    )


def byte_counts(
    split: PackedSplit, pieces: Sequence[bytes], *, scored_only: bool
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How often each of the 256 byte values occurs in a split's text.

    Args:
        pieces: the bytes of every token id; markers have none.
    """
    tokens = np.zeros(len(pieces), dtype=np.int64)
    for start in range(0, len(split.tokens), TOKENS_AT_ONCE):
        window = slice(start, start + TOKENS_AT_ONCE)
        ids = np.asarray(split.tokens[window])
        if scored_only and split.scored is not None:
            ids = ids[np.asarray(split.scored[window]) != 0]
        tokens += np.bincount(ids, minlength=len(pieces))
    counts = np.zeros(256, dtype=np.int64)
    for token, piece in enumerate(pieces):
        if tokens[token]:
            values = np.bincount(np.frombuffer(piece, dtype=np.uint8), minlength=256)
            counts += tokens[token] * values
    return counts


def first_bytes(
    split: PackedSplit, pieces: Sequence[bytes], limit: int, *, scored_only: bool
) -> bytes:
    """The first bytes of a split's documents, joined."""
    texts: list[bytes] = []
    size = 0
    for start, end in zip(split.doc_starts[:-1], split.doc_starts[1:], strict=True):
        ids = np.asarray(split.tokens[start:end])
        if scored_only and split.scored is not None:
            ids = ids[np.asarray(split.scored[start:end]) != 0]
        texts.append(b"".join([pieces[token] for token in ids.tolist()]))
        size += len(texts[-1])
        if size >= limit:
            break
    return b"".join(texts)[:limit]
