"""Token bytes to text, a chunk at a time; and the continuation of a prompt."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.infer.engine import Engine, StopCallback
from valkyrie_core.infer.sampling import SamplingConfig, make_generator


class Utf8Stream:
    """Decodes bytes that arrive in pieces; a character is emitted once, whole.

    What can't be UTF-8 becomes U+FFFD as soon as that is certain, so the joined chunks equal
    `b"".join(pieces).decode("utf-8", errors="replace")`.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, piece: bytes) -> str:
        """The characters that this piece completes; may be empty."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character was cut, else nothing."""
        return self._decoder.decode(b"", final=True)


class Completion(NamedTuple):
    """A text that was continued."""

    text: str
    """What was added to the prompt."""
    prompt_tokens: int
    tokens: int
    """Tokens drawn, the end marker included."""
    ended: bool
    """Whether the model ended the document itself, rather than running into the limit."""
    prefill_seconds: float
    decode_seconds: float


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingConfig,
    *,
    max_tokens: int,
    on_text: Callable[[str], None] | None = None,
    stop: StopCallback | None = None,
) -> Completion:
    """Continues a prompt as the beginning of a document, until the document ends.

    Args:
        on_text: called with each piece of text as it is known.
        stop: polled before every chunk and token.
    """
    end = tokenizer.special_id("<|doc|>")
    ids = [end, *tokenizer.encode(prompt)]
    stream, texts, drawn, ended = Utf8Stream(), [], 0, False
    began = time.perf_counter()
    known = engine.prefill(
        torch.tensor([ids], dtype=torch.int64), engine.model.init_state(1), stop=stop
    )
    prefilled = time.perf_counter()

    def emit(text: str) -> None:
        if text:
            texts.append(text)
            if on_text is not None:
                on_text(text)

    if known is not None:
        for token in engine.continue_from(
            known,
            sampling,
            make_generator(sampling.seed),
            max_tokens=max_tokens,
            stop_ids=(end,),
            history=ids,
            stop=stop,
        ):
            drawn, ended = drawn + 1, token.is_stop
            emit(stream.feed(tokenizer.token_bytes(token.id)))
        emit(stream.finish())
    return Completion(
        text="".join(texts),
        prompt_tokens=len(ids),
        tokens=drawn,
        ended=ended,
        prefill_seconds=prefilled - began,
        decode_seconds=time.perf_counter() - prefilled,
    )
