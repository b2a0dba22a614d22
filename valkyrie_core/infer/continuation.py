"""One text, continued."""

from __future__ import annotations

import time
from collections.abc import Iterator

from valkyrie_core.data.tokenizer import Tokenizer, opening
from valkyrie_core.infer.engine import Engine, StopCallback
from valkyrie_core.infer.sampling import SamplingConfig
from valkyrie_core.infer.state_file import SavedState
from valkyrie_core.infer.text import Utf8Stream
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.weights import Precision, Weights


class Continuation:
    """Iterating draws the text that follows a prompt, piece by piece; the counts follow.

    The prompt begins a document, or goes on with what a state has read. The text ends where the
    model begins another document.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        prompt: str,
        sampling: SamplingConfig,
        *,
        max_tokens: int,
        saved: SavedState | None = None,
        stop: StopCallback | None = None,
        weights: Weights = "fp32",
        precision: Precision = "fp32",
    ) -> None:
        """
        Args:
            max_tokens: the longest continuation.
            saved: what was read before the prompt, which then goes on with it.
            stop: polled before every chunk and token.
            weights, precision: how the model computes; see `Engine`.
        """
        self._engine = Engine(model, weights=weights, precision=precision)
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._stop = stop
        self._begin = opening(tokenizer, model.memory_tokens)
        self._prompt = tokenizer.encode(prompt)
        self._saved = saved
        self.prompt_tokens = len(self._prompt)
        self.tokens = 0
        """Text tokens drawn so far."""
        self.ended = False
        """Whether the model ended the text itself."""
        self._drawing_seconds = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token, which waits for the prompt; None before the second."""
        if self.tokens < 2 or self._drawing_seconds <= 0:
            return None
        return (self.tokens - 1) / self._drawing_seconds

    def __iter__(self) -> Iterator[str]:
        stream = Utf8Stream()
        self.tokens, self.ended, self._drawing_seconds = 0, False, 0.0
        began = time.perf_counter()
        prompt, state = [*self._begin, *self._prompt], self._engine.model.init_state(1)
        history: tuple[int, ...] = ()
        if self._saved is not None:
            prompt, (history, state) = self._prompt, self._saved
        for token in self._engine.generate(
            prompt,
            state,
            self._sampling,
            max_tokens=self._max_tokens,
            stop_ids=(self._begin[0],),
            history=history,
            stop=self._stop,
        ):
            if token.is_stop:
                self.ended = True
                break
            now = time.perf_counter()
            if self.tokens == 0:
                began = now
            self._drawing_seconds = now - began
            self.tokens += 1
            if piece := stream.feed(self._tokenizer.token_bytes(token.id)):
                yield piece
        if piece := stream.finish():
            yield piece
