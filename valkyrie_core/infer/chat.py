"""A conversation that keeps the model's state after every turn.

A turn reads its own new tokens and nothing else; undoing one is dropping the last snapshot, and a
fork is keeping it. A state can be kept in a file, and a conversation begin with one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from valkyrie_core.data.documents import chat_pieces, clean_text
from valkyrie_core.data.tokenizer import Tokenizer, encode_pieces, opening
from valkyrie_core.errors import UsageError
from valkyrie_core.infer.engine import Engine, Prefilled, StopCallback, Token
from valkyrie_core.infer.sampling import SamplingConfig, make_generator
from valkyrie_core.infer.state_file import SavedState, read_state, write_state
from valkyrie_core.infer.text import Utf8Stream
from valkyrie_core.infer.transcript import Turn, read_transcript, write_transcript
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import LMState, num_bytes
from valkyrie_core.nn.state_format import settle
from valkyrie_core.nn.weights import Precision, Weights


class Snapshot(NamedTuple):
    """Where a conversation stands after a turn."""

    turn: Turn | None
    """None before the first."""
    tokens: tuple[int, ...]
    """The tokens that this turn added, markers included."""
    total_tokens: int
    """Tokens of the conversation so far."""
    state: LMState


class ChatStats(NamedTuple):
    """What the last turn cost, and how large the conversation is."""

    turns: int
    """Since the beginning, or since the state that was loaded."""
    conversation_tokens: int
    """Tokens that the present state has read."""
    prefilled_tokens: int
    """Tokens of the last turn that were read without being drawn: question and markers."""
    drawn_tokens: int
    """Tokens of the last turn that were drawn."""
    prefill_seconds: float
    decode_seconds: float
    state_bytes: int
    """Memory of the present state."""

    @property
    def tokens_per_second(self) -> float:
        """Drawn tokens per second of drawing; 0 before the first answer."""
        return self.drawn_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0


class Branch(NamedTuple):
    """One of several conversations that began as one."""

    number: int
    """Counted from 1."""
    turns: int
    tokens: int
    last: str
    """The last question; empty before the first."""
    is_present: bool
    """Whether this is the one that goes on."""


class _Cost:
    """Counters of the turn that is being answered."""

    def __init__(self) -> None:
        self.prefilled = self.drawn = 0
        self.prefill_seconds = self.decode_seconds = 0.0


class ChatSession:
    """One conversation with one model.

    `send` commits a turn when its answer is complete, or when `stop` ended it early; whoever
    abandons the iterator, or an error, leaves the session as it was.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        *,
        max_tokens: int = 256,
        stop: StopCallback | None = None,
        weights: Weights = "fp32",
        precision: Precision = "fp32",
    ) -> None:
        """
        Args:
            sampling: may be replaced between turns by setting the attribute.
            max_tokens: per answer.
            stop: polled before every chunk and token.
            weights, precision: how the model computes; see `Engine`.
        """
        self.engine = Engine(model, weights=weights, precision=precision)
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = stop
        self._end = tokenizer.special_id("<|end|>")
        self._cost = _Cost()
        self._snapshots = [Snapshot(None, (), 0, model.init_state(1))]
        self._branches = [self._snapshots]
        """Every branch; the present one's entry is brought up to date when it is left."""
        self._present = 0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation, oldest first."""
        return tuple(one.turn for one in self._snapshots if one.turn is not None)

    @property
    def tokens(self) -> list[int]:
        """Every token that the present state has read."""
        return [token for one in self._snapshots for token in one.tokens]

    @property
    def state(self) -> LMState:
        """The model's state after the last turn."""
        return self._snapshots[-1].state

    def send(self, text: str) -> Iterator[str]:
        """Asks; yields the answer in pieces of text as they are known."""
        return self._answer(self._snapshots, clean_text(text), self.sampling.seed)

    def retry(self) -> Iterator[str]:
        """Answers the last question again with the next seed; the old answer goes when done.

        Raises:
            UsageError: nothing was asked yet.
        """
        last = self._snapshots[-1].turn
        if last is None:
            raise UsageError("there is no answer to retry")
        return self._answer(self._snapshots[:-1], last.user, last.seed + 1)

    def undo(self) -> Turn:
        """Forgets the last turn, at once; returns it.

        Raises:
            UsageError: there is no turn.
        """
        last = self._snapshots[-1].turn
        if last is None:
            raise UsageError("there is no turn to undo")
        self._snapshots = self._snapshots[:-1]
        self._cost = _Cost()
        return last

    def fork(self) -> int:
        """Another branch that begins here; the one before stays as it is. Returns its number."""
        self._branches[self._present] = self._snapshots
        self._branches.append(self._snapshots)
        self._present = len(self._branches) - 1
        self._cost = _Cost()
        return self._present + 1

    def switch(self, number: int) -> None:
        """Goes on with another branch, at once.

        Raises:
            UsageError: there is no such branch.
        """
        if not 1 <= number <= len(self._branches):
            raise UsageError(
                f"there is no branch {number}: there are 1 to {len(self._branches)}"
                if len(self._branches) > 1
                else f"there is no branch {number}: /fork makes a second one"
            )
        self._branches[self._present] = self._snapshots
        self._present = number - 1
        self._snapshots = self._branches[self._present]
        self._cost = _Cost()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, in the order in which they were made."""
        found = []
        for index, kept in enumerate(self._branches):
            snapshots = self._snapshots if index == self._present else kept
            last = snapshots[-1]
            asked = last.turn.user if last.turn else ""
            turns = len(snapshots) - 1
            found.append(Branch(index + 1, turns, last.total_tokens, asked, index == self._present))
        return tuple(found)

    def save_state(self, path: Path) -> int:
        """Writes the present state, whole or not at all; returns the bytes of the file.

        Raises:
            UsageError: nothing was read yet, or a file of another kind is there.
            ResourceError: it can't be written.
        """
        if not self.tokens:
            raise UsageError("there is no state to save: nothing was read yet")
        saved = SavedState(tuple(self.tokens), self.state)
        return write_state(path, saved, self.engine.model, self.tokenizer)

    def load_state(self, path: Path) -> int:
        """Begins with a saved state, at once; returns how many tokens it has read.

        What was said before it can't be undone; `reset` comes back to it.

        Raises:
            MissingError: there is no such file.
            UsageError: it is no state, or one of another model; the session is unchanged.
        """
        tokens, state = read_state(path, self.engine.model, self.tokenizer)
        self._snapshots = [Snapshot(None, tokens, len(tokens), state)]
        self._cost = _Cost()
        return len(tokens)

    def reset(self) -> None:
        """Forgets the conversation: back to its beginning, or to the state that was loaded."""
        self._snapshots = self._snapshots[:1]
        self._cost = _Cost()

    def stats(self) -> ChatStats:
        """The cost of the last turn (zeros after an undo, reset or load) and the totals."""
        cost = self._cost
        return ChatStats(
            turns=len(self._snapshots) - 1,
            conversation_tokens=self._snapshots[-1].total_tokens,
            prefilled_tokens=cost.prefilled,
            drawn_tokens=cost.drawn,
            prefill_seconds=cost.prefill_seconds,
            decode_seconds=cost.decode_seconds,
            state_bytes=num_bytes(self.state),
        )

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON, whole or not at all.

        Raises:
            UsageError: it began with a state, of which the text is not known.
            ResourceError: it can't be written.
        """
        if self._snapshots[0].tokens:
            raise UsageError(
                "this conversation began with a saved state: its text alone can't be read again",
                hint="/save-state FILE keeps it",
            )
        write_transcript(path, self.turns, self.engine.model, self.tokenizer)

    def load(self, path: Path) -> None:
        """Replaces the conversation by a saved one, reading its tokens again.

        Raises:
            MissingError: there is no such file.
            UsageError: it is no transcript, or one of another model; the session is unchanged.
        """
        turns = read_transcript(path, self.engine.model, self.tokenizer)
        snapshots = [Snapshot(None, (), 0, self.engine.model.init_state(1))]
        for turn in turns:
            ids = [*self._question(snapshots, turn.user), *turn.tokens, self._end]
            known = self.engine.prefill(torch.tensor([ids]), snapshots[-1].state)
            assert known is not None
            snapshots = self._grown(snapshots, turn, ids, known.state)
        self._snapshots = snapshots
        self._cost = _Cost()

    def _question(self, snapshots: list[Snapshot], text: str) -> list[int]:
        """The tokens from the end of the last turn to the beginning of the answer."""
        ids = encode_pieces(self.tokenizer, chat_pieces([("user", text)])).tokens
        begins = snapshots[-1].total_tokens == 0
        first = opening(self.tokenizer, self.engine.model.memory_tokens) if begins else []
        return [*first, *ids, self.tokenizer.special_id("<|assistant|>")]

    def _answer(self, snapshots: list[Snapshot], text: str, seed: int) -> Iterator[str]:
        """Draws an answer after `snapshots` and commits it at the end."""
        cost = _Cost()
        began = time.perf_counter()
        question = self._question(snapshots, text)
        known = self.engine.prefill(
            torch.tensor([question], dtype=torch.int64), snapshots[-1].state, stop=self.stop
        )
        cost.prefill_seconds = time.perf_counter() - began
        if known is None:
            return
        stream, drawn, state, unread = Utf8Stream(), [], known.state, [self._end]
        # each turn has draws of its own; asking the same again after an undo answers the same
        generator = make_generator(seed, len(snapshots))
        history = [*(token for one in snapshots for token in one.tokens), *question]
        answer = self.engine.continue_from(
            known,
            self.sampling,
            generator,
            max_tokens=self.max_tokens,
            stop_ids=(self._end,),
            history=history,
            stop=self.stop,
        )
        for token in _timed(answer, cost):
            state = token.state
            cost.drawn += 1
            if token.is_stop:
                unread = [self._end]
                break
            drawn.append(token.id)
            unread = [token.id, self._end]
            if piece := stream.feed(self.tokenizer.token_bytes(token.id)):
                yield piece
        if piece := stream.finish():
            yield piece
        # an answer that ran out of tokens is closed all the same: the next turn needs its marker
        closed = self._close(unread, state)
        turn = Turn(
            user=text, assistant=self.tokenizer.decode(drawn), tokens=tuple(drawn), seed=seed
        )
        added = [*question, *drawn, self._end]
        cost.prefilled = len(added) - cost.drawn
        self._snapshots = self._grown(snapshots, turn, added, closed.state)
        self._cost = cost

    def _grown(
        self, snapshots: list[Snapshot], turn: Turn, tokens: list[int], state: LMState
    ) -> list[Snapshot]:
        total = snapshots[-1].total_tokens + len(tokens)
        kept = settle(self.engine.model, state)
        return [*snapshots, Snapshot(turn, tuple(tokens), total, kept)]

    def _close(self, unread: list[int], state: LMState) -> Prefilled:
        closed = self.engine.prefill(torch.tensor([unread], dtype=torch.int64), state)
        assert closed is not None
        return closed


def _timed(tokens: Iterator[Token], cost: _Cost) -> Iterator[Token]:
    """The same tokens, counting the time they take but not what the listener does in between."""
    while True:
        began = time.perf_counter()
        token = next(tokens, None)
        cost.decode_seconds += time.perf_counter() - began
        if token is None:
            return
        yield token
