"""Runs a trained model forward: prefill, one token at a time, one row or many.

States go in and come out as values: whoever keeps an old one has a fork.
Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.infer.sampling import SamplingConfig, allowed_tokens, make_generator, sample
from valkyrie_core.nn.decode import Decoder
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import LMState, map_tensors
from valkyrie_core.nn.state_format import StateFormat, pack, unpack
from valkyrie_core.nn.weights import Precision, Weights

StopCallback = Callable[[], bool]
PADDING_DOCUMENT = -1
FEW = 4
"""Tokens that are read faster one by one, natively, than as a window: the end of an answer."""


class Token(NamedTuple):
    """One drawn token."""

    id: int
    is_stop: bool
    """Whether it is one of the stop ids; it is then the last."""
    state: LMState
    """After every token before this one; the token itself has not been read yet."""


class Prefilled(NamedTuple):
    """What a model knows after reading tokens."""

    logits_BV: Tensor
    """Scores of the next token."""
    state: LMState
    """After the last token."""


class Engine:
    """Draws tokens from a model; holds no conversation and no randomness of its own.

    `tokens_read` counts the tokens that went through the model (rows times their real length).
    The model's weights may change between calls, as an optimizer or `load_state_dict` changes them:
    the next prefill notices. What is written through a parameter's `.data` can't be noticed: call
    `refresh()` after it.
    """

    def __init__(
        self,
        model: HybridLM,
        *,
        weights: Weights = "fp32",
        precision: Precision = "fp32",
        chunk_len: int = 512,
        kept: StateFormat | None = None,
    ) -> None:
        """
        Args:
            weights: the format of the matrices (see `nn/weights.py`); fp32 is what was trained.
            precision: of the matrix products of a prefill; bf16 runs them under autocast.
            chunk_len: tokens per forward pass of a prefill; bounds its memory.
            kept: how the state is kept after every window; None: as it was computed.
        """
        if chunk_len < 1:
            raise ValueError(f"chunk_len must be at least 1, not {chunk_len}")
        self.model = model
        self.weights, self.precision = weights, precision
        self._decoder: Decoder | None = None
        self.chunk_len = chunk_len
        self.kept = kept or StateFormat()
        self.tokens_read = 0
        self.device = next(model.parameters()).device

    def refresh(self) -> None:
        """Reads the model's weights anew at the next call."""
        self._decoder = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model scores."""
        size = self.model.config.vocab_size
        if size is None:
            raise ValueError("the model's config names no vocab_size")
        return size

    def prefill(
        self,
        tokens_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None = None,
        *,
        stop: StopCallback | None = None,
    ) -> Prefilled | None:
        """Reads tokens in chunks, carrying the state.

        Args:
            tokens_BT: int64, at least one token.
            doc_BT: document ids, -1 for padding; left out, the state's document continues.
            stop: polled before every chunk.

        Returns:
            The logits after each row's last real token and the state, or None if `stop` said so.

        Raises:
            ValueError: no token, or a row of padding alone.
        """
        num_rows, num_tokens = tokens_BT.shape
        last_B = torch.full((num_rows,), num_tokens - 1)
        if doc_BT is not None:
            real_BT = (doc_BT >= 0).cpu()
            last_B = torch.where(real_BT, torch.arange(num_tokens), -1).amax(dim=1)
        if num_tokens == 0 or int(last_B.min()) < 0:
            raise ValueError("every row needs at least one token to read")
        decoder = self._current_decoder()
        if doc_BT is None and num_tokens <= FEW and decoder.takes_steps(num_rows):
            return self._read_by_steps(tokens_BT, state, stop)
        logits_BV: Tensor | None = None
        for start in range(0, num_tokens, self.chunk_len):
            if stop is not None and stop():
                return None
            window = slice(start, start + self.chunk_len)
            docs = None if doc_BT is None else doc_BT[:, window]
            width = min(self.chunk_len, num_tokens - start)
            inside_B = (last_B >= start) & (last_B < start + width)
            index_B = (last_B - start).clamp(0, width - 1)
            ends_BV, state = self._read(decoder, tokens_BT[:, window], state, docs, index_B)
            state = unpack(pack(state, self.kept))
            if logits_BV is None:
                logits_BV = torch.zeros_like(ends_BV)
            logits_BV = torch.where(inside_B[:, None].to(self.device), ends_BV, logits_BV)
        assert logits_BV is not None
        return Prefilled(logits_BV, state)

    def _read_by_steps(
        self, tokens_BT: Tensor, state: LMState, stop: StopCallback | None
    ) -> Prefilled | None:
        known: Prefilled | None = None
        for t in range(tokens_BT.shape[1]):
            # one chunk, whatever it is made of
            if t % self.chunk_len == 0 and stop is not None and stop():
                return None
            known = self.decode_one_token(tokens_BT[:, t], state)
            state = known.state
        return known

    @torch.inference_mode()
    def decode_one_token(
        self, tokens_B: Tensor, state: LMState, doc_B: Tensor | None = None
    ) -> Prefilled:
        """Reads one token per row; a row whose document is -1 is left as it is.

        Without documents every row goes on with its own: that is the fast way.
        """
        decoder = self._decoder
        if decoder is None or not decoder.is_current(changes_only=True):
            decoder = self._current_decoder()
        if doc_B is not None:
            first_B = torch.zeros_like(tokens_B)
            return Prefilled(
                *self._read(decoder, tokens_B[:, None], state, doc_B[:, None], first_B)
            )
        self.tokens_read += tokens_B.shape[0]
        with _evaluating(decoder.model):
            return Prefilled(*decoder.step(tokens_B.to(self.device), state))

    @torch.inference_mode()
    def token_losses(
        self, tokens_BT: Tensor, targets_BT: Tensor, state: LMState
    ) -> tuple[Tensor, LMState]:
        """Reads one window: the loss [B, T] in nats of every target (-100: 0), and the state."""
        decoder = self._current_decoder()
        self.tokens_read += tokens_BT.numel()
        with _evaluating(decoder.model):
            losses_BT, state = decoder.token_losses(
                tokens_BT.to(self.device), targets_BT.to(self.device), state
            )
        return losses_BT, unpack(pack(state, self.kept))

    def generate(
        self,
        prompt: Sequence[int],
        state: LMState,
        sampling: SamplingConfig,
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        history: Sequence[int] = (),
        stop: StopCallback | None = None,
    ) -> Iterator[Token]:
        """Reads the prompt into a batch-1 state and draws tokens after it, one by one.

        `history` is what the state has read before, for the repetition penalty.
        Ends after a stop id, after `max_tokens`, or when `stop`, polled before every chunk and
        token, says so.
        """
        known = self.prefill(torch.tensor([list(prompt)], dtype=torch.int64), state, stop=stop)
        if known is not None:
            yield from self.continue_from(
                known,
                sampling,
                make_generator(sampling.seed),
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                history=[*history, *prompt],
                stop=stop,
            )

    def continue_from(
        self,
        known: Prefilled,
        sampling: SamplingConfig,
        generator: torch.Generator,
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        history: Sequence[int] = (),
        stop: StopCallback | None = None,
    ) -> Iterator[Token]:
        """As `generate`, from what has been read already (batch 1)."""
        allowed_V = allowed_tokens(self.vocab_size, stop_ids)
        so_far = list(history)
        for index in range(max_tokens):
            if stop is not None and stop():
                return
            drawn_B = sample(
                known.logits_BV, sampling, [generator], allowed_V=allowed_V, histories=[so_far]
            )
            token = int(drawn_B[0])
            so_far.append(token)
            yield Token(token, token in stop_ids, known.state)
            if token in stop_ids:
                return
            if index + 1 < max_tokens:
                known = self.decode_one_token(drawn_B, known.state)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        stop: StopCallback | None = None,
    ) -> list[list[int]]:
        """Answers many prompts at once, each as if it were alone.

        Row i draws from the generator (sampling.seed, i). Prompts are padded on the right with
        document -1; a finished row is left out.

        Returns:
            Per prompt, the drawn tokens, its stop id included.

        Raises:
            ValueError: no prompt, or an empty one.
        """
        if not prompts:
            raise ValueError("no prompt")
        longest = max(len(prompt) for prompt in prompts)
        tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        doc_BT = torch.full_like(tokens_BT, PADDING_DOCUMENT)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
            doc_BT[row, : len(prompt)] = 0
        answers: list[list[int]] = [[] for _ in prompts]
        known = self.prefill(tokens_BT, self.model.init_state(len(prompts)), doc_BT, stop=stop)
        if known is None:
            return answers
        allowed_V = allowed_tokens(self.vocab_size, stop_ids)
        generators = [make_generator(sampling.seed, row) for row in range(len(prompts))]
        histories = [list(prompt) for prompt in prompts]
        active = list(range(len(prompts)))
        for index in range(max_tokens):
            if stop is not None and stop():
                break
            drawn_A = sample(
                known.logits_BV,
                sampling,
                [generators[row] for row in active],
                allowed_V=allowed_V,
                histories=[histories[row] for row in active],
            )
            kept = []
            for row, token in zip(active, drawn_A.tolist(), strict=True):
                answers[row].append(token)
                histories[row].append(token)
                kept.append(token not in stop_ids)
            if not any(kept) or index + 1 == max_tokens:
                break
            state = known.state
            if not all(kept):
                # a finished row leaves the batch, and the others cost less
                chosen = torch.tensor(kept)
                active = [row for row, stays in zip(active, kept, strict=True) if stays]
                drawn_A, state = drawn_A[chosen], _rows(state, chosen.to(self.device))
            known = self.decode_one_token(drawn_A, state)
        return answers

    def _current_decoder(self) -> Decoder:
        """The decoder of the weights that the model has now."""
        if self._decoder is None or not self._decoder.is_current():
            self._decoder = Decoder(self.model, self.weights, precision=self.precision)
        return self._decoder

    @torch.inference_mode()
    def _read(
        self,
        decoder: Decoder,
        tokens_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None,
        index_B: Tensor,
    ) -> tuple[Tensor, LMState]:
        """One forward pass: the logits after the token at `index_B` of each row."""
        self.tokens_read += tokens_BT.numel() if doc_BT is None else int((doc_BT >= 0).sum())
        with _evaluating(decoder.model):
            return decoder.read(
                tokens_BT.to(self.device),
                state,
                None if doc_BT is None else doc_BT.to(self.device),
                index_B.to(self.device),
            )


@contextmanager
def _evaluating(model: HybridLM) -> Iterator[None]:
    """Evaluation mode inside; the model's mode is put back afterwards."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@torch.inference_mode()
def _rows(state: LMState, chosen_B: Tensor) -> LMState:
    """The state of some of the rows."""
    return map_tensors(lambda tensor: tensor[chosen_B], state)
