"""Packed tokens: one stream of documents per split, memory-mapped.

A document is stored as `<|doc|>` and its tokens; the stream holds the documents in order. So the
token after a document's last one is the `<|doc|>` of the next: predicting it is predicting the
end. It is scored where the whole document before it is (plain text, not conversations).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from valkyrie_core.data.documents import Document, Progress
from valkyrie_core.data.tokenizer import NO_LABEL, Tokenizer, encode_pieces, opening

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SplitCounts:
    """How much text a split holds."""

    documents: int
    tokens: int
    """With one `<|doc|>` per document."""
    scored_tokens: int
    """Tokens that a model is trained to predict; labels come on top."""
    bytes: int
    """UTF-8 bytes of all text."""
    truncated: int
    """Documents whose tokens stand for fewer bytes than the document has."""

    @property
    def bytes_per_token(self) -> float:
        """How much text one token stands for."""
        return self.bytes / self.tokens


@dataclass(frozen=True)
class PackedSplit:
    """The token stream of one split."""

    tokens: npt.NDArray[Any]
    """uint16 or uint32, memory-mapped."""
    scored: npt.NDArray[np.uint8] | None
    """1 where a token is to be predicted; None: everywhere."""
    doc_starts: Int64
    """[documents + 1]: where each document's `<|doc|>` is; last the length of the stream."""
    doc_bytes: Int64
    """[documents]: UTF-8 bytes of each document's scored text."""
    names: list[str]
    """The documents' names."""
    token_lengths: Int64
    """[vocab_size]: the bytes that each token stands for; 0 for the reserved ones."""
    counts: SplitCounts
    labels: npt.NDArray[np.int32] | None = None
    """What training asks for after a token instead of the next one, -100: the next one; None:
    that everywhere."""

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.names)

    def document_tokens(self, index: int) -> npt.NDArray[Any]:
        """The tokens of one document, without its `<|doc|>`."""
        return self.tokens[self.doc_starts[index] + 1 : self.doc_starts[index + 1]]

    def texts(self, tokenizer: Tokenizer) -> Iterator[bytes]:
        """The UTF-8 text of each document, without special tokens."""
        for index in range(self.num_documents):
            yield tokenizer.decode_bytes(self.document_tokens(index).tolist())


def token_lengths(tokenizer: Tokenizer) -> Int64:
    """[vocab_size]: the bytes that each token stands for."""
    lengths = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]
    return np.array(lengths, dtype=np.int64)


def chosen(
    split: PackedSplit, documents: Sequence[int], *, max_tokens: int | None = None
) -> PackedSplit:
    """Some documents of a split, as a split of their own, in memory.

    Args:
        max_tokens: of each document, its marker included, at most.
    """
    lengths = np.diff(split.doc_starts)[list(documents)]
    if max_tokens is not None:
        lengths = np.minimum(lengths, max_tokens)
    starts = split.doc_starts[list(documents)]
    places = np.concatenate(
        [np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    )
    tokens = np.asarray(split.tokens[places])
    scored = None if split.scored is None else np.asarray(split.scored[places])
    labels = None if split.labels is None else np.asarray(split.labels[places])
    num_scored = len(tokens) if scored is None else int(scored.sum())
    num_bytes = int(split.token_lengths[tokens.astype(np.int64)].sum())
    return PackedSplit(
        tokens=tokens,
        scored=scored,
        doc_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        doc_bytes=split.doc_bytes[list(documents)],
        names=[split.names[one] for one in documents],
        token_lengths=split.token_lengths,
        counts=SplitCounts(len(documents), len(tokens), num_scored, num_bytes, 0),
        labels=labels,
    )


def write_split(
    directory: Path,
    tokenizer: Tokenizer,
    documents: list[Document],
    progress: Progress,
    what: str,
    memory_tokens: int = 0,
) -> dict[str, Any]:
    """Tokenises and writes one split; returns what `open_split` needs to know about it.

    Args:
        memory_tokens: empty tokens after every document's marker, which nothing predicts.
    """
    directory.mkdir(parents=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    lengths = token_lengths(tokenizer)
    marker = opening(tokenizer, memory_tokens)
    starts, doc_bytes = [0], []
    text_bytes = scored_tokens = truncated = 0
    has_labels = False
    end_scored = all(piece.scored for piece in documents[-1].pieces)
    with (
        (directory / "tokens.bin").open("wb") as file,
        (directory / "scored.bin").open("wb") as flags,
        (directory / "labels.bin").open("wb") as told,
    ):
        for number, document in enumerate(documents):
            ids, scored, labels = encode_pieces(tokenizer, document.pieces)
            stored = np.array(marker + ids, dtype=dtype)
            mask = np.array([end_scored, *[False] * memory_tokens, *scored], dtype=np.uint8)
            stored.tofile(file)
            mask.tofile(flags)
            own = [*[NO_LABEL] * len(marker), *(labels or [NO_LABEL] * len(ids))]
            np.array(own, dtype=np.int32).tofile(told)
            has_labels |= labels is not None
            starts.append(starts[-1] + len(stored))
            doc_bytes.append(document.scored_bytes)
            text_bytes += document.num_bytes
            scored_tokens += int(mask.sum())
            truncated += int(lengths[stored].sum()) != document.num_bytes
            end_scored = all(scored)
            progress(what, number + 1, len(documents))
    if scored_tokens == starts[-1]:
        (directory / "scored.bin").unlink()
    if not has_labels:
        (directory / "labels.bin").unlink()
    np.array([*starts, *doc_bytes], dtype=np.int64).tofile(directory / "documents.bin")
    names = [document.name for document in documents]
    (directory / "names.json").write_text(json.dumps(names), encoding="utf-8")
    counts = SplitCounts(len(documents), starts[-1], scored_tokens, text_bytes, truncated)
    return {"dtype": dtype, "counts": asdict(counts), "labels": has_labels}


def open_split(directory: Path, content: dict[str, Any], lengths: Int64) -> PackedSplit:
    """Maps what `write_split` wrote; `lengths` is the tokenizer's `token_lengths`."""
    counts = SplitCounts(**content["counts"])
    documents = np.fromfile(directory / "documents.bin", dtype=np.int64)
    scored = None
    if counts.scored_tokens < counts.tokens:
        scored = np.memmap(directory / "scored.bin", dtype=np.uint8, mode="r")
    labels = None
    if content.get("labels"):
        labels = np.memmap(directory / "labels.bin", dtype=np.int32, mode="r")
    return PackedSplit(
        tokens=np.memmap(directory / "tokens.bin", dtype=content["dtype"], mode="r"),
        scored=scored,
        doc_starts=documents[: counts.documents + 1],
        doc_bytes=documents[counts.documents + 1 :],
        names=json.loads((directory / "names.json").read_text(encoding="utf-8")),
        token_lengths=lengths,
        counts=counts,
        labels=labels,
    )
