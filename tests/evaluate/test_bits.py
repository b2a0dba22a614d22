from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.evaluate.splits import TOKENIZER, chat, pack, texts
from tests.infer.test_engine import Countdown
from tests.nn.menu import awake, hybrid_config
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.errors import DivergedError, StoppedError
from valkyrie_core.evaluate.bits import Context, bits_per_byte, chunks, cut_documents, item_scores
from valkyrie_core.nn.model import IGNORED, HybridLM

CONTENTS = ("To be, or not to be", "é", "that is the question", "", "a" * 41)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return awake(hybrid_config(vocab_size=TOKENIZER.vocab_size))


@pytest.fixture
def split(tmp_path: Path) -> PackedSplit:
    return pack(tmp_path / "split", texts(*CONTENTS))


def by_hand(model: HybridLM, split: PackedSplit) -> tuple[float, int]:
    """Nats and bytes, one document at a time, in one forward each."""
    nats, num_bytes = 0.0, 0
    for start, end in zip(split.doc_starts[:-1], split.doc_starts[1:], strict=True):
        ids = torch.from_numpy(np.asarray(split.tokens[start:end]).astype(np.int64))
        if len(ids) < 2:
            continue
        flags = None if split.scored is None else torch.from_numpy(split.scored[start:end].copy())
        with torch.no_grad():
            logits = model(ids[None, :-1], model.init_state(1)).logits_BTV[0]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        scored = ids[1:] >= NUM_RESERVED
        if flags is not None:
            scored &= flags[1:] != 0
        nats += float(losses[scored].sum())
        num_bytes += int(split.token_lengths[ids[1:][scored].numpy()].sum())
    return nats, num_bytes


@pytest.mark.parametrize("context_len", [1, 7, 16, 512])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_carried_chunks_give_what_whole_documents_give(
    model: HybridLM, split: PackedSplit, context_len: int, batch_size: int
) -> None:
    nats, num_bytes = by_hand(model, split)
    score = bits_per_byte(model, split, context_len=context_len, batch_size=batch_size)
    assert score.nats == pytest.approx(nats, abs=1e-6)
    assert score.bytes == num_bytes == sum(len(text.encode()) for text in CONTENTS)
    assert score.bytes == int(split.doc_bytes.sum())
    assert score.tokens == num_bytes  # a token per byte
    assert score.bpb == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-8)
    assert score.documents == 4  # one is empty
    assert score.complete


@pytest.mark.parametrize("context_len", [2, 7, 16, 512])
def test_windows_score_every_token_once_with_half_a_window_before_it(
    split: PackedSplit, context_len: int
) -> None:
    pieces = cut_documents(split, context_len, context="window", max_tokens=None)
    starts = split.doc_starts
    scored: list[int] = []
    for piece in pieces:
        assert piece.end - piece.start <= context_len + 1
        for position in range(piece.score_from, piece.end):
            known = position - piece.start
            whole = position - int(starts[piece.document])
            assert known == whole or known > context_len // 2
            scored.append(position)
    expected = [p for p in range(len(split.tokens)) if p not in set(starts.tolist())]
    assert sorted(scored) == expected
    assert len(scored) == len(set(scored))


@pytest.mark.parametrize("context", ["window", "carried"])
def test_a_long_document_leaves_room_for_others(split: PackedSplit, context: Context) -> None:
    def taken(max_tokens: int | None, of_document: int | None) -> dict[int, int]:
        pieces = cut_documents(
            split, 4, context=context, max_tokens=max_tokens, of_document=of_document
        )
        ends: dict[int, int] = {}
        for piece in pieces:
            start = int(split.doc_starts[piece.document])
            ends[piece.document] = max(ends.get(piece.document, 0), piece.end - start)
        return ends

    lengths = dict(enumerate(np.diff(split.doc_starts).tolist()))
    whole = {document: length for document, length in lengths.items() if length > 1}
    assert taken(None, None) == whole
    assert taken(None, 5) == {document: min(5, length) for document, length in whole.items()}
    # the marker that begins a document counts, too
    first = taken(7, 5)
    assert sum(first.values()) + sum(lengths[d] == 1 for d in range(max(first))) <= 7
    assert len(first) > 1
    # without a bound of each, the first so many of all
    assert list(taken(7, None)) == [0]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows_as_long_as_the_documents_give_the_same(
    model: HybridLM, split: PackedSplit, batch_size: int
) -> None:
    long = bits_per_byte(model, split, context_len=64, context="window", batch_size=batch_size)
    assert long.nats == pytest.approx(by_hand(model, split)[0], abs=1e-6)
    short = bits_per_byte(model, split, context_len=8, context="window", batch_size=batch_size)
    assert short.bytes == long.bytes
    assert short.nats != pytest.approx(long.nats, abs=1e-3)


def test_batch_size_changes_nothing_for_windows(model: HybridLM, split: PackedSplit) -> None:
    nats = {
        round(
            bits_per_byte(
                model, split, context_len=6, context="window", batch_size=batch_size
            ).nats,
            6,
        )
        for batch_size in (1, 2, 5)
    }
    assert len(nats) == 1


def test_conversations_are_scored_on_the_text_of_answers(model: HybridLM, tmp_path: Path) -> None:
    conversation = chat(("user", "How?"), ("assistant", "Well."), ("user", "?"), ("assistant", "!"))
    split = pack(tmp_path / "chat", [conversation, chat(("user", "a"), ("assistant", "bc"))])
    score = bits_per_byte(model, split, context_len=5, batch_size=2)
    nats, num_bytes = by_hand(model, split)
    assert score.bytes == num_bytes == len("Well.!bc")
    assert score.nats == pytest.approx(nats, abs=1e-6)


def test_a_uniform_model_needs_eight_bits_and_the_markers(
    model: HybridLM, split: PackedSplit
) -> None:
    import copy

    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.head.weight)
    score = bits_per_byte(uniform, split, context_len=9)
    assert score.bpb == pytest.approx(math.log2(TOKENIZER.vocab_size), abs=1e-9)


def test_max_tokens_reads_the_first_ones_and_says_so(model: HybridLM, split: PackedSplit) -> None:
    score = bits_per_byte(model, split, context_len=8, max_tokens=12)
    assert score.tokens == 11  # the marker is read, not scored
    assert not score.complete
    assert score.documents == 1
    everything = bits_per_byte(model, split, context_len=8, max_tokens=10**6)
    assert everything.complete
    assert everything == bits_per_byte(model, split, context_len=8).model_copy(
        update={"seconds": everything.seconds}
    )


def test_progress_ends_at_the_total(model: HybridLM, split: PackedSplit) -> None:
    calls: list[tuple[int, int]] = []
    bits_per_byte(
        model, split, context_len=8, batch_size=2, progress=lambda *call: calls.append(call)
    )
    assert len(calls) > 3
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


def test_stop_gives_the_part_that_was_scored(model: HybridLM, split: PackedSplit) -> None:
    score = bits_per_byte(model, split, context_len=8, batch_size=1, stop=Countdown(2))
    assert score.tokens == 16
    assert not score.complete
    with pytest.raises(StoppedError):
        bits_per_byte(model, split, context_len=8, stop=Countdown(0))


def test_nan_is_reported(split: PackedSplit) -> None:
    broken = awake(hybrid_config(vocab_size=TOKENIZER.vocab_size))
    with torch.no_grad():
        broken.head.weight[9, 0] = float("nan")
    with pytest.raises(DivergedError, match="not finite"):
        bits_per_byte(broken, split, context_len=8)


def test_nothing_to_score(model: HybridLM, tmp_path: Path) -> None:
    split = pack(tmp_path / "empty", texts("", ""))
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model, split, context_len=8)


def test_bf16_is_near_and_leaves_the_model_as_it_was(split: PackedSplit) -> None:
    model = awake(hybrid_config(vocab_size=TOKENIZER.vocab_size)).float()
    model.train()
    exact = bits_per_byte(model, split, context_len=16)
    rough = bits_per_byte(model, split, context_len=16, precision="bf16")
    assert rough.precision == "bf16"
    assert rough.bpb != exact.bpb
    assert rough.bpb == pytest.approx(exact.bpb, rel=0.05)
    assert model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_chunks_are_no_wider_than_the_longest_and_start_afresh(split: PackedSplit) -> None:
    pieces = cut_documents(split, 16, context="carried", max_tokens=None)
    shapes = [
        (tuple(chunk.tokens_BT.shape), chunk.offset == 0)
        for chunk in chunks(split, pieces, batch_size=2, context_len=16)
    ]
    # lengths 41, 20, 19, 2 (é is two bytes; the last token is a target alone)
    assert shapes == [
        ((2, 16), True), ((2, 16), False), ((2, 9), False), ((2, 16), True), ((2, 3), False),
    ]  # fmt: skip
    for chunk in chunks(split, pieces, batch_size=2, context_len=16):
        assert bool((chunk.targets_BT[chunk.doc_BT == -1] == IGNORED).all())


@pytest.mark.parametrize("context_len", [7, 512])
def test_items_add_up_to_the_whole(model: HybridLM, split: PackedSplit, context_len: int) -> None:
    whole = bits_per_byte(model, split, context_len=context_len)
    items = item_scores(model, split, context_len=context_len, batch_size=3)
    # the empty document says nothing
    assert [(one.document, one.stretch) for one in items] == [(0, 0), (1, 0), (2, 0), (4, 0)]
    assert [one.bytes for one in items] == [len(text.encode()) for text in CONTENTS if text]
    assert sum(one.nats for one in items) == pytest.approx(whole.nats)
    alone = item_scores(model, split, context_len=context_len, batch_size=1)
    assert [one.nats for one in alone] == pytest.approx([one.nats for one in items])


@pytest.mark.parametrize("context", ["carried", "window"])
def test_stretches_of_a_document_add_up(
    model: HybridLM, split: PackedSplit, context: Context
) -> None:
    whole = bits_per_byte(model, split, context_len=7, context=context)
    items = item_scores(model, split, context_len=7, context=context)
    assert sum(one.nats for one in items) == pytest.approx(whole.nats)
    stretches = item_scores(model, split, context_len=7, context=context, stretch=10)
    for one in items:
        own = [part for part in stretches if part.document == one.document]
        assert [part.stretch for part in own] == list(range(len(own)))
        assert sum(part.nats for part in own) == pytest.approx(one.nats)
        assert sum(part.bytes for part in own) == one.bytes
        # bytes are tokens here, and no stretch has more than ten
        assert max(part.bytes for part in own) <= 10


def test_items_that_are_not_finite(split: PackedSplit) -> None:
    broken = awake(hybrid_config(vocab_size=TOKENIZER.vocab_size))
    with torch.no_grad():
        broken.head_norm.weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match="not finite"):
        item_scores(broken, split, context_len=16)
