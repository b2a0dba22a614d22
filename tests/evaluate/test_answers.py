"""Answers that are right in one pass are those that greedy decoding gives."""

from __future__ import annotations

import pytest
import torch

from tests.evaluate.splits import TOKENIZER, pack
from tests.nn.menu import awake, hybrid_config
from valkyrie_core.data.documents import Document, Piece
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.tokenizer import SPECIAL_TOKENS
from valkyrie_core.evaluate.answers import right_answers
from valkyrie_core.nn.model import HybridLM

PROMPTS = ("ab ba: a1=", "(3+4)%7 = ", "?", "what is it: ", "1+1 = ", "so")


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return awake(hybrid_config(vocab_size=TOKENIZER.vocab_size)).double()


def greedy(model: HybridLM, prompt: str, count: int) -> str | None:
    """What the model says after a prompt; None where it says no text."""
    ids = [SPECIAL_TOKENS.index("<|doc|>") + 1, *TOKENIZER.encode(prompt)]
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids]), model.init_state(1)).logits_BTV[0, -1]
            ids.append(int(logits.argmax()))
    text = TOKENIZER.decode(ids[start:])
    # only what comes back as the same tokens can be an answer in a text
    return text if TOKENIZER.encode(text) == ids[start:] else None


@pytest.fixture(scope="module")
def asked(
    model: HybridLM, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PackedSplit, list[bool]]:
    """Questions whose answers are what the model says, and others whose last place is wrong."""
    documents, expected = [], []
    for index, prompt in enumerate(PROMPTS):
        for length in (1, 3, 6):
            said = greedy(model, prompt, length)
            if said is None:
                continue
            wrong = said[:-1] + ("x" if said[-1] != "x" else "y")
            for answer, right in ((said, True), (wrong, False)):
                pieces = (Piece(prompt, scored=False), Piece(answer))
                documents.append(Document(f"{index}/{length}/{right}", pieces))
                expected.append(right)
    assert len(documents) >= 6
    return pack(tmp_path_factory.mktemp("answers") / "split", documents), expected


@pytest.mark.parametrize(("context_len", "batch_size"), [(512, 32), (5, 3), (64, 1)])
def test_what_greedy_decoding_says(
    model: HybridLM, asked: tuple[PackedSplit, list[bool]], context_len: int, batch_size: int
) -> None:
    split, expected = asked
    read = []
    found = right_answers(
        model,
        split,
        context_len=context_len,
        batch_size=batch_size,
        progress=lambda done, total: read.append((done, total)),
    )
    assert found == expected
    assert read[-1][0] == read[-1][1]


def test_what_is_not_finite_is_not_right(asked: tuple[PackedSplit, list[bool]]) -> None:
    broken = awake(hybrid_config(vocab_size=TOKENIZER.vocab_size))
    with torch.no_grad():
        broken.head_norm.weight.fill_(torch.nan)
    assert not any(right_answers(broken, asked[0], context_len=64))
