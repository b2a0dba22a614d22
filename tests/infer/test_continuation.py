from __future__ import annotations

import time

import pytest

from tests.infer.test_engine import Countdown
from tests.nn.menu import awake, hybrid_config
from valkyrie_core.data.byte_tokenizer import BytesTokenizer
from valkyrie_core.infer.continuation import Continuation
from valkyrie_core.infer.sampling import SamplingConfig
from valkyrie_core.nn.model import HybridLM

TOKENIZER = BytesTokenizer()
SAMPLING = SamplingConfig(temperature=1.2, top_p=1.0, seed=3)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return awake(hybrid_config(vocab_size=TOKENIZER.vocab_size)).float()


def test_draws_the_same_text_again(model: HybridLM) -> None:
    continuation = Continuation(model, TOKENIZER, "To be", SAMPLING, max_tokens=30)
    text = "".join(continuation)
    assert (continuation.prompt_tokens, continuation.tokens) == (5, 30)
    assert not continuation.ended
    assert "".join(continuation) == text
    other = SAMPLING.model_copy(update={"seed": 4})
    assert "".join(Continuation(model, TOKENIZER, "To be", other, max_tokens=30)) != text


def test_ends_with_the_document(model: HybridLM) -> None:
    hot = SamplingConfig(temperature=10, top_p=1.0)
    continuation = Continuation(model, TOKENIZER, "x", hot, max_tokens=5000)
    assert len(list(continuation)) > 0
    assert continuation.ended
    assert continuation.tokens < 5000


def test_an_empty_prompt_begins_a_document(model: HybridLM) -> None:
    continuation = Continuation(model, TOKENIZER, "", SAMPLING, max_tokens=4)
    list(continuation)
    assert (continuation.prompt_tokens, continuation.tokens) == (0, 4)


@pytest.mark.parametrize(("polls", "tokens"), [(0, 0), (1, 0), (3, 2)])
def test_stop(model: HybridLM, polls: int, tokens: int) -> None:
    continuation = Continuation(
        model, TOKENIZER, "x", SAMPLING, max_tokens=9, stop=Countdown(polls)
    )
    list(continuation)
    assert continuation.tokens == tokens
    assert not continuation.ended


def test_speed_leaves_the_prompt_out(model: HybridLM) -> None:
    continuation = Continuation(model, TOKENIZER, "x" * 2000, SAMPLING, max_tokens=3)
    assert continuation.tokens_per_second is None
    pieces = iter(continuation)
    began = time.perf_counter()
    next(pieces)
    waited = time.perf_counter() - began
    list(pieces)
    assert continuation.tokens_per_second is not None
    assert continuation.tokens_per_second > 1 / waited
    one = Continuation(model, TOKENIZER, "x", SAMPLING, max_tokens=1)
    list(one)
    assert one.tokens_per_second is None
