"""Laws 1 to 5, over every type of every union, in fp64 and at odd sizes."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.nn.menu import CONFIGS as PLAIN
from tests.nn.menu import FFNS, HALTING, MIXERS, VOCAB, awake
from valkyrie_core.nn import kv_cache, masked_attention
from valkyrie_core.nn.block import ChannelMixer, TokenMixer
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import LMState, map_tensors

CONFIGS = {**PLAIN, **HALTING}
TIGHT = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def keys_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of a few tokens trims its cache within the few tokens of a law."""
    monkeypatch.setattr(kv_cache, "TRIMMED_AT_ONCE", 1)
    monkeypatch.setattr(masked_attention, "QUERIES_AT_ONCE", 8)


pytestmark = pytest.mark.parametrize("name", list(CONFIGS))


def run(
    model: HybridLM, tokens_BT: Tensor, doc_BT: Tensor | None = None, sizes: list[int] | None = None
) -> tuple[Tensor, LMState]:
    """Logits over windows of the given sizes, the state carried from one to the next."""
    state = model.init_state(tokens_BT.shape[0])
    pieces, start = [], 0
    with torch.no_grad():
        for size in sizes or [tokens_BT.shape[1]]:
            stop = start + size
            doc = None if doc_BT is None else doc_BT[:, start:stop]
            out = model(tokens_BT[:, start:stop], state, doc)
            pieces.append(out.logits_BTV)
            state, start = out.state, stop
    return torch.cat(pieces, dim=1), state


def tokens(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


# runs of documents, a document that comes back after another, padding at both ends and inside
DOCS = torch.tensor(
    [
        [7] * 5 + [3] * 1 + [9] * 20 + [3] * 11,
        [-1] * 3 + [4] * 9 + [-1] * 2 + [4] * 6 + [5] * 15 + [-1] * 2,
        [2] * 36 + [-1],
    ]
)


@pytest.mark.parametrize("with_documents", [False, True])
def test_law_1_the_future_changes_nothing(name: str, with_documents: bool) -> None:
    model = awake(CONFIGS[name])
    doc = DOCS if with_documents else None
    x = tokens(3, 37)
    before, _ = run(model, x, doc)
    for t in (1, 8, 19, 36):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 5) % VOCAB
        after, _ = run(model, changed, doc)
        torch.testing.assert_close(after[:, :t], before[:, :t], **TIGHT)
        if doc is None:
            assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("sizes", [[1] * 37, [7] * 5 + [2], [36, 1], [1, 33, 3], [13, 24]])
@pytest.mark.parametrize("with_documents", [False, True])
def test_law_2_any_chunking_gives_one_answer(
    name: str, sizes: list[int], with_documents: bool
) -> None:
    model = awake(CONFIGS[name])
    doc = DOCS if with_documents else None
    x = tokens(3, 37)
    whole, _ = run(model, x, doc)
    pieces, _ = run(model, x, doc, sizes)
    real = torch.ones_like(x, dtype=torch.bool) if doc is None else doc >= 0
    torch.testing.assert_close(pieces[real], whole[real], **TIGHT)


def test_law_3_a_packed_document_is_alone(name: str) -> None:
    model = awake(CONFIGS[name])
    x = tokens(3, 37)
    packed, _ = run(model, x, DOCS)
    for row in range(3):
        for doc_id, places in _documents(DOCS[row]):
            alone, _ = run(model, x[row, places][None], torch.full((1, len(places)), doc_id))
            torch.testing.assert_close(packed[row, places], alone[0], **TIGHT)


def _documents(doc_T: Tensor) -> list[tuple[int, list[int]]]:
    """(id, places) of every run of one document; padding inside does not end it."""
    real = [(t, int(doc)) for t, doc in enumerate(doc_T.tolist()) if doc >= 0]
    return [
        (doc_id, [t for t, _ in group])
        for doc_id, group in ((k, list(g)) for k, g in itertools.groupby(real, lambda p: p[1]))
    ]


def test_law_3_position_zero_continues_the_same_document_only(name: str) -> None:
    model = awake(CONFIGS[name])
    x = tokens(1, 20)
    one = torch.full((1, 20), 6)
    whole, _ = run(model, x, one)
    _, middle = run(model, x[:, :9], one[:, :9])
    with torch.no_grad():
        continued = model(x[:, 9:], middle, one[:, 9:]).logits_BTV
        other = model(x[:, 9:], middle, one[:, 9:] + 1).logits_BTV
    fresh, _ = run(model, x[:, 9:])
    torch.testing.assert_close(continued, whole[:, 9:], **TIGHT)
    torch.testing.assert_close(other, fresh, **TIGHT)


def test_law_4_an_old_state_still_gives_the_old_answer(name: str) -> None:
    model = awake(CONFIGS[name])
    x = tokens(2, 12)
    _, old = run(model, x)
    kept = map_tensors(Tensor.clone, old)
    left, right = tokens(2, 5, seed=2), tokens(2, 7, seed=3)
    with torch.no_grad():
        first = model(left, old).logits_BTV
        second = model(right, old)
        third = model(left, second.state).logits_BTV
        again = model(left, old).logits_BTV
        from_copy = model(left, kept).logits_BTV
    torch.testing.assert_close(again, first, **TIGHT)
    torch.testing.assert_close(from_copy, first, **TIGHT)
    whole, _ = run(model, torch.cat([x, right, left], dim=1))
    torch.testing.assert_close(third, whole[:, -5:], **TIGHT)


def test_law_5_batch_mates_and_padding_change_nothing(name: str) -> None:
    model = awake(CONFIGS[name])
    x = tokens(3, 37)
    together, _ = run(model, x, DOCS)
    for row in range(3):
        alone, _ = run(model, x[row : row + 1], DOCS[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **TIGHT)
    garbage = torch.where(DOCS < 0, (x + 11) % VOCAB, x)
    other, _ = run(model, garbage, DOCS)
    torch.testing.assert_close(other[DOCS >= 0], together[DOCS >= 0], **TIGHT)


def test_law_6_gradients_of_windows_agree_with_the_whole(name: str) -> None:
    model = awake(CONFIGS[name])
    x, y = tokens(3, 37), tokens(3, 37, seed=4)
    y = y.masked_fill(DOCS < 0, -100)
    names = [n for n, _ in model.named_parameters()]
    loss, _, _ = model.loss(x, y, model.init_state(3), DOCS)
    whole = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    state, total = model.init_state(3), torch.zeros((), dtype=torch.float64)
    for start, stop in ((0, 10), (10, 11), (11, 37)):
        window = slice(start, stop)
        count = (y[:, window] != -100).sum()
        piece, state, _ = model.loss(x[:, window], y[:, window], state, DOCS[:, window])
        total = total + piece * count
    parts = torch.autograd.grad(
        total / (y != -100).sum(), list(model.parameters()), allow_unused=True
    )
    for n, a, b in zip(names, whole, parts, strict=True):
        assert (a is None) == (b is None), n
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10, msg=f"gradient of {n}")


def test_loss_counts_only_scored_targets(name: str) -> None:
    model = awake(CONFIGS[name])
    x, y = tokens(2, 9), tokens(2, 9, seed=5)
    y[:, ::2] = -100
    losses, _ = model.token_losses(x, y, model.init_state(2))
    # what is trained besides is told apart
    with torch.no_grad():
        loss, _, _ = model.loss(x, y, model.init_state(2))
    assert (losses[y == -100] == 0).all()
    torch.testing.assert_close(loss, losses.sum() / (y != -100).sum())


def test_the_menu_covers_every_type(name: str) -> None:
    def types(union: object) -> set[str]:
        return {c.model_fields["type"].default for c in get_args(get_args(union)[0])}

    assert types(TokenMixer) == {m["type"] for m in MIXERS.values()}
    assert types(ChannelMixer) == {f["type"] for f in FFNS.values()}
