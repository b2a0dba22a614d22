"""Runs a trained model forward: prefill, one token at a time, one row or many.

States go in and come out as values: whoever keeps an old one has a fork.
Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.infer.sampling import SamplingConfig, allowed_tokens, make_generator, sample
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import LMState

StopCallback = Callable[[], bool]
PADDING_DOCUMENT = -1


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
    """

    def __init__(self, model: HybridLM, *, chunk_len: int = 512) -> None:
        """chunk_len: tokens per forward pass of a prefill; bounds its memory."""
        if chunk_len < 1:
            raise ValueError(f"chunk_len must be at least 1, not {chunk_len}")
        self.model = model
        self.chunk_len = chunk_len
        self.tokens_read = 0
        self.device = next(model.parameters()).device

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
            real_BT = (doc_BT != PADDING_DOCUMENT).cpu()
            last_B = torch.where(real_BT, torch.arange(num_tokens), -1).amax(dim=1)
        if num_tokens == 0 or int(last_B.min()) < 0:
            raise ValueError("every row needs at least one token to read")
        logits_BV: Tensor | None = None
        for start in range(0, num_tokens, self.chunk_len):
            if stop is not None and stop():
                return None
            window = slice(start, start + self.chunk_len)
            docs = None if doc_BT is None else doc_BT[:, window]
            chunk_BTV, state = self._forward(tokens_BT[:, window], state, docs)
            inside_B = ((last_B >= start) & (last_B < start + chunk_BTV.shape[1])).to(self.device)
            index_B = (last_B - start).clamp(0, chunk_BTV.shape[1] - 1).to(self.device)
            ends_BV = chunk_BTV[torch.arange(num_rows, device=self.device), index_B]
            if logits_BV is None:
                logits_BV = torch.zeros_like(ends_BV)
            logits_BV = torch.where(inside_B[:, None], ends_BV, logits_BV)
        assert logits_BV is not None
        return Prefilled(logits_BV, state)

    def decode_one_token(
        self, tokens_B: Tensor, state: LMState, doc_B: Tensor | None = None
    ) -> Prefilled:
        """Reads one token per row; a row whose document is -1 is left as it is."""
        docs = None if doc_B is None else doc_B[:, None]
        logits_BTV, state = self._forward(tokens_B[:, None], state, docs)
        return Prefilled(logits_BTV[:, -1], state)

    def generate(
        self,
        prompt: Sequence[int],
        state: LMState,
        sampling: SamplingConfig,
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        stop: StopCallback | None = None,
    ) -> Iterator[Token]:
        """Reads the prompt into a batch-1 state and draws tokens after it, one by one.

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
                history=prompt,
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
        document -1; a finished row is left out the same way.

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
                known.logits_BV[active],
                sampling,
                [generators[row] for row in active],
                allowed_V=allowed_V,
                histories=[histories[row] for row in active],
            )
            tokens_B = torch.zeros(len(prompts), dtype=torch.int64)
            tokens_B[active] = drawn_A
            for row, token in zip(active, drawn_A.tolist(), strict=True):
                answers[row].append(token)
                histories[row].append(token)
            active = [row for row in active if answers[row][-1] not in stop_ids]
            if not active or index + 1 == max_tokens:
                break
            doc_B = torch.full((len(prompts),), PADDING_DOCUMENT)
            doc_B[active] = 0
            known = self.decode_one_token(tokens_B, known.state, doc_B)
        return answers

    @torch.inference_mode()
    def _forward(
        self, tokens_BT: Tensor, state: LMState, doc_BT: Tensor | None
    ) -> tuple[Tensor, LMState]:
        """One forward pass in evaluation mode; the model's mode is put back afterwards."""
        self.tokens_read += (
            tokens_BT.numel() if doc_BT is None else int((doc_BT != PADDING_DOCUMENT).sum())
        )
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            output = self.model(
                tokens_BT.to(self.device), state, None if doc_BT is None else doc_BT.to(self.device)
            )
        finally:
            if was_training:
                self.model.train()
        return output.logits_BTV, output.state
