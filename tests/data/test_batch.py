from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.helpers import write_stories
from tests.data.test_dataset import chat_corpus, config
from valkyrie_core.data.batch import IGNORED, BatchStream, LaneStream, _quotas
from valkyrie_core.data.dataset import DataConfig, Dataset, PackedCorpus, prepare
from valkyrie_core.data.packing import PackedSplit, SplitCounts, chosen
from valkyrie_core.data.tasks.task import is_held_out


@pytest.fixture
def stories(tmp_path: Path) -> Dataset:
    write_stories(tmp_path / "texts", 12)
    return prepare(config(tmp_path), cache=tmp_path / "cache")


def stream(data: Dataset, seed: int = 0, batch_size: int = 4, context_len: int = 32) -> BatchStream:
    return BatchStream(
        data, weights=data.weights, seed=seed, batch_size=batch_size, context_len=context_len
    )


def synthetic(
    lengths: list[int], scored: list[int] | None = None, name: str = "c", weight: float = 1.0
) -> tuple[Dataset, PackedSplit]:
    """A data set whose token at place p is p + 10, so that places can be read off a batch."""
    total = sum(lengths)
    split = PackedSplit(
        tokens=np.arange(10, 10 + total, dtype=np.uint32),
        scored=None if scored is None else np.array(scored, dtype=np.uint8),
        doc_starts=np.cumsum([0, *lengths]).astype(np.int64),
        doc_bytes=np.array(lengths, dtype=np.int64),
        names=[str(n) for n in range(len(lengths))],
        token_lengths=np.ones(10 + total, dtype=np.int64),
        counts=SplitCounts(len(lengths), total, total, total, 0),
    )
    corpus = PackedCorpus(name, split, split, {})
    data: Any = Dataset({name: corpus}, None, "f", {name: weight}, Path())  # type: ignore[arg-type]
    return data, split


def test_a_batch_is_a_function_of_seed_and_step(stories: Dataset) -> None:
    a, b = stream(stories), stream(stories)
    forward = [a.batch(step) for step in range(40)]
    for step in (39, 0, 17, 17, 3):
        for x, y in zip(forward[step], b.batch(step), strict=True):
            assert torch.equal(x, y)
    assert not torch.equal(forward[0].tokens_BT, forward[1].tokens_BT)
    assert not torch.equal(forward[0].tokens_BT, stream(stories, seed=1).batch(0).tokens_BT)


def test_batches_do_not_change_between_versions() -> None:
    # the same on every machine and with every numpy: a resumed run reads what it would have read
    data, _ = synthetic([50, 30, 40])
    batch = stream(data, seed=7, batch_size=3, context_len=8).batch(5)
    assert batch.tokens_BT[:, 0].tolist() == [64, 96, 24]


def test_shapes_types_and_the_shift(stories: Dataset) -> None:
    split = stories.corpora["stories"].train
    stored = split.tokens.tolist()
    ring = stored + stored
    for step in range(20):
        tokens, targets, doc = stream(stories).batch(step)
        for tensor in (tokens, targets, doc):
            assert tensor.shape == (4, 32)
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        for row in range(4):
            window = [*tokens[row].tolist(), int(targets[row, -1])]
            places = [p for p in range(len(stored)) if ring[p : p + 33] == window]
            assert places
            for t in range(32):
                index = int(doc[row, t]) % split.num_documents
                start, end = split.doc_starts[index], split.doc_starts[index + 1]
                assert any(start <= (p + t) % len(stored) < end for p in places)


def test_an_epoch_takes_every_target_once_but_for_less_than_a_window() -> None:
    data, _ = synthetic([40, 1, 59, 27])
    batches = stream(data, batch_size=1, context_len=10)
    for epoch in range(5):
        rows = [batches.batch(epoch * 12 + index) for index in range(12)]
        targets = Counter(t for row in rows for t in row.targets_BT[0].tolist())
        assert len(targets) == 120
        assert set(targets.values()) == {1}
        assert set(targets) <= set(range(10, 137))


def test_epochs_differ_in_order_and_phase() -> None:
    data, _ = synthetic([1000])
    batches = stream(data, batch_size=1, context_len=10)
    starts = [
        [int(batches.batch(e * 100 + i).tokens_BT[0, 0]) for i in range(100)] for e in range(3)
    ]
    assert all(order != sorted(order) for order in starts)
    assert len({order[0] % 10 for order in starts}) > 1
    assert len({tuple(np.argsort(order)) for order in starts}) == 3


def test_document_ids_tell_documents_apart() -> None:
    data, split = synthetic([5, 3, 9, 4])
    batches = stream(data, batch_size=2, context_len=30)
    for step in range(10):
        tokens, _, doc = batches.batch(step)
        for row in range(2):
            places = tokens[row].numpy() - 10
            ids = doc[row].numpy()
            # within a row, a new id exactly where a marker is
            starts = np.isin(places[1:], split.doc_starts[:-1])
            assert np.array_equal(ids[1:] != ids[:-1], starts)
            # the ring turns: the same document later in a row is another one
            assert (
                len(set(ids[np.isin(places, split.doc_starts[:-1])]))
                == np.isin(places, split.doc_starts[:-1]).sum()
            )


@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 33, 34])
def test_tiny_corpora_fill_a_window(length: int) -> None:
    data, _ = synthetic([length])
    tokens, targets, doc = stream(data).batch(3)
    assert tokens.shape == (4, 32)
    assert (targets != IGNORED).all()
    assert ((tokens - 10 + 1) % length == (targets - 10)).all()
    assert (doc >= 0).all()
    new = (doc[:, 1:] != doc[:, :-1]) == (tokens[:, 1:] == 10)
    assert new.all()


def test_only_scored_targets_are_left(tmp_path: Path) -> None:
    values = DataConfig.model_validate(
        {"corpora": {"chat": chat_corpus(tmp_path, 30)}, "tokenizer": {"type": "bytes"}}
    )
    data = prepare(values, cache=tmp_path / "cache")
    split = data.corpora["chat"].train
    assert split.scored is not None
    stored = split.tokens.tolist()
    flags = split.scored.tolist()
    seen = Counter[int]()
    for step in range(30):
        tokens, targets, doc = stream(data, batch_size=2, context_len=16).batch(step)
        assert ((targets != IGNORED).sum(dim=1) > 0).all()
        for row in range(2):
            (place,) = [
                p
                for p in range(len(stored))
                if [stored[(p + i) % len(stored)] for i in range(16)] == tokens[row].tolist()
                and np.searchsorted(split.doc_starts, p, "right") - 1
                == doc[row, 0] % split.num_documents
            ]
            for t in range(16):
                at = (place + 1 + t) % len(stored)
                assert targets[row, t] == (stored[at] if flags[at] else IGNORED)
                seen[at] += flags[at]
    assert any(seen.values())


def test_windows_without_a_target_are_skipped_and_all_others_drawn() -> None:
    scored = [0] * 200
    for place in (3, 77, 78, 150):
        scored[place] = 1
    data, _ = synthetic([200], scored)
    batches = stream(data, batch_size=1, context_len=10)
    drawn = Counter[int]()
    for step in range(300):
        targets = batches.batch(step).targets_BT[0]
        kept = targets[targets != IGNORED]
        assert len(kept) > 0
        drawn.update((kept - 10).tolist())
    assert set(drawn) == {3, 77, 78, 150}
    # each epoch draws each of them once: no target is drawn much more often than another
    assert max(drawn.values()) - min(drawn.values()) <= 2


def test_labels_are_targets_where_there_are_any(tmp_path: Path) -> None:
    corpus = {
        "type": "questions",
        "task": {"type": "group", "group": "s3", "lengths": [5, 9]},
        "examples": 40,
        "validation_examples": 6,
    }
    described = DataConfig.model_validate(
        {"corpora": {"s3": corpus}, "tokenizer": {"type": "bytes"}}
    )
    data = prepare(described, cache=tmp_path)
    packed = data.corpora["s3"]
    assert packed.validation.labels is None
    assert packed.train.labels is not None
    assert chosen(packed.train, [1, 3]).labels is not None
    asked = {one.prompt: one for one in described.corpora["s3"].training()}  # type: ignore[union-attr]
    seen = 0
    for step in range(30):
        tokens, targets, docs = stream(data, batch_size=2, context_len=24).batch(step)
        for row in range(2):
            for document in set(docs[row].tolist()):
                places = (docs[row] == document).nonzero().flatten().tolist()
                one = asked.get(data.tokenizer.decode(tokens[row, places].tolist())[:-2])
                starts = tokens[row, places[0]] == data.tokenizer.special_id("<|doc|>")
                if one is None or not starts:  # cut by the window
                    continue
                said = targets[row, places[1:]].tolist()
                for end, label in enumerate(one.labels[:-1]):
                    asked_elsewhere = is_held_out(one.prompt[: end + 1], 0.1)
                    expected = IGNORED if asked_elsewhere else data.tokenizer.encode(label)[0]
                    assert said[end] == expected
                behind = said[len(one.labels) - 1 :][:2]
                assert data.tokenizer.decode(behind) == one.answer + "\n"
                seen += 1
    assert seen > 20
    # a window of nothing but a row's beginning has targets, too; one of a row that is cut has none
    short = stream(data, batch_size=2, context_len=3)
    lead = data.tokenizer.special_id("<|doc|>")
    found = [short.batch(n) for n in range(40)]
    assert all(bool((one.targets_BT != IGNORED).any(1).all()) for one in found)
    starts = torch.cat([one.tokens_BT[:, 0] for one in found]) == lead
    assert bool(starts.any())
    for one in found:
        for row in range(2):
            marks = (one.tokens_BT[row] == lead).nonzero().flatten().tolist()
            before = marks[0] if marks else 3
            assert (one.targets_BT[row, :before] == IGNORED).all()


def test_a_jump_ahead_gives_the_same_in_a_masked_corpus() -> None:
    scored = [int(place % 37 == 0) for place in range(500)]
    data, _ = synthetic([500], scored)
    walked = [stream(data, context_len=16).batch(step) for step in range(1)]
    patient = stream(data, context_len=16)
    walked = [patient.batch(step) for step in range(60)]
    for step in (59, 30, 0):
        jumped = stream(data, context_len=16).batch(step)
        assert all(torch.equal(a, b) for a, b in zip(jumped, walked[step], strict=True))


def mixture(weights: dict[str, float]) -> Dataset:
    corpora = {}
    for offset, name in enumerate(weights):
        _, split = synthetic([300])
        shifted = PackedSplit(
            **{**split.__dict__, "tokens": split.tokens + np.uint32(1000 * offset)}
        )
        corpora[name] = PackedCorpus(name, shifted, shifted, {})
    return Dataset(corpora, None, "f", weights, Path())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 3.0, "b": 1.0}, [630, 210]),
        ({"a": 0.1, "b": 0.2, "c": 0.4}, [120, 240, 480]),
        ({"a": 1.0, "b": 1e-6}, [839, 1]),
        ({"a": 5.0}, [840]),
    ],
)
def test_every_block_holds_the_exact_shares(weights: dict[str, float], expected: list[int]) -> None:
    batches = stream(mixture(weights), batch_size=84, context_len=4)
    orders = []
    for block in range(3):
        firsts = torch.cat([batches.batch(block * 10 + i).tokens_BT[:, 0] for i in range(10)])
        corpora = (firsts // 1000).tolist()
        assert [corpora.count(n) for n in range(len(weights))] == expected
        orders.append(tuple(corpora))
    if len(weights) > 1:
        assert len(set(orders)) == 3


def test_corpora_are_read_on_across_blocks() -> None:
    # one corpus's windows come in the order of its own epochs, whatever is mixed in
    alone, mixed = mixture({"a": 1.0}), mixture({"a": 1.0, "b": 1.0})
    own = stream(alone, batch_size=1, context_len=30)
    together = stream(mixed, batch_size=1, context_len=30)
    firsts = [int(together.batch(step).tokens_BT[0, 0]) for step in range(2000)]
    of_a = [first for first in firsts if first < 1000]
    assert of_a == [int(own.batch(step).tokens_BT[0, 0]) for step in range(len(of_a))]


def test_quotas_add_up_and_are_never_zero() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 100, 900):
        weights = (generator.random(count) ** 8 + 1e-9).tolist()
        quotas = _quotas(weights, 840)
        assert quotas.sum() == max(840, 10 * count)
        assert quotas.min() >= 1


def test_weights_must_name_the_corpora(stories: Dataset) -> None:
    with pytest.raises(ValueError, match="weights"):
        BatchStream(stories, weights={"other": 1.0}, seed=0, batch_size=1, context_len=8)


def lanes(
    data: Dataset, *, batch_size: int = 3, context_len: int = 8, chunks: int = 5
) -> LaneStream:
    return LaneStream(
        stream(data, batch_size=batch_size, context_len=context_len * chunks), context_len
    )


def test_a_row_of_lanes_goes_on_where_it_ended() -> None:
    data, split = synthetic([400, 300, 300])
    found, chunks, before = lanes(data), 5, None
    for step in range(40):
        batch = found.batch(step)
        assert batch.tokens_BT.shape == (3, 8)
        assert torch.equal(batch.targets_BT[:, :-1], batch.tokens_BT[:, 1:])
        for row in range(3):
            begins_sample = (step + row * chunks // 3) % chunks == 0
            if before is not None and not begins_sample:
                assert batch.tokens_BT[row, 0] == before.targets_BT[row, -1]
                place = int(batch.tokens_BT[row, 0]) - 10
                same = batch.doc_BT[row, 0] == before.doc_BT[row, -1]
                # a turn of the ring begins the first document again
                assert bool(same) == (place not in split.doc_starts)
            elif before is not None:
                assert batch.doc_BT[row, 0] != before.doc_BT[row, -1]
        before = batch


def test_lanes_read_what_their_stream_does_and_no_target_twice_in_an_epoch() -> None:
    data, _ = synthetic([1000])
    found, chunks = lanes(data, batch_size=5), 5
    # 25 windows of 40 tokens: lanes begin inside their first sample, so look at whole samples
    targets = [found.batch(step).targets_BT for step in range(chunks * 6)]
    whole = stream(data, batch_size=5, context_len=40)
    for row in range(5):
        skipped = (chunks - row * chunks // 5) % chunks
        read = torch.cat([batch[row] for batch in targets])[skipped * 8 :]
        first = 0 if skipped == 0 else 1
        for turn in range(first, 5):
            sample = whole.row(turn * 5 + row)[1]
            place = (turn - first) * 40
            assert read[place : place + 40].tolist() == sample.tolist()
    assert len({int(t) for row in range(25) for t in whole.row(row)[1]}) == 1000


def test_lanes_are_a_function_of_the_step(stories: Dataset) -> None:
    forward = [lanes(stories).batch(step) for step in range(20)]
    found = lanes(stories)
    for step in (19, 0, 7, 7, 3):
        for x, y in zip(forward[step], found.batch(step), strict=True):
            assert torch.equal(x, y)


def test_lanes_need_whole_chunks(stories: Dataset) -> None:
    with pytest.raises(ValueError, match="chunks of 7 do not make 40 tokens"):
        LaneStream(stream(stories, context_len=40), 7)


def test_streams_of_another_order_begin_elsewhere(stories: Dataset) -> None:
    one = stream(stories).batch(0)
    other = BatchStream(
        stories, weights=stories.weights, seed=0, batch_size=4, context_len=32, order=1
    ).batch(0)
    assert not torch.equal(one.tokens_BT, other.tokens_BT)
