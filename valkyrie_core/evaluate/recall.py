"""Whether a model finds in a long text what it is asked for.

Facts stand in a text at known depths (`recall_cases.py`); then the text is asked for each. A text
is read once, and every question goes on from a fork of the state after it. Small models never write
a right answer, so that answers are ranked as well: by the log-probability of the right one among
candidates that were drawn from the same list.

Shapes: B rows, T time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import StoppedError
from valkyrie_core.evaluate.long_context import Told
from valkyrie_core.evaluate.recall_cases import (
    CANDIDATES,
    WORDS,
    Case,
    Question,
    Task,
    encode,
)
from valkyrie_core.infer.engine import Engine, Prefilled

EQUAL = 1e-6
"""Nats per token between which scores are equal: they come from sums in fp32."""


class Answer(NamedTuple):
    """What became of one question."""

    task: Task
    length: int
    depth: float | None
    rank: int
    """Of the right answer among the candidates, 0 is the likeliest."""
    written: bool
    """Whether the model, left to itself, writes the right answer."""
    place: int
    """Of the right answer in `WORDS`."""


class Recall(NamedTuple):
    """One task at one length, and at one depth or at all of them."""

    task: Task
    length: int
    depth: float | None
    questions: int
    first: float
    """The share of questions whose right answer is the likeliest candidate."""
    mean_rank: float
    """Of the right answer; 0 is the best, and half of the candidates what guessing gives."""
    written: float
    """The share of right answers that the model writes by itself."""
    chance: float
    """The share that guessing among the candidates gets."""
    constant: float
    """The share that one word gets, the best one for all lengths of the task."""


def ask(
    engine: Engine, tokenizer: Tokenizer, known: Prefilled, question: Question
) -> tuple[int, bool]:
    """The rank of the right answer, and whether the model writes it; `known` stays as it is."""
    ids = encode(tokenizer, question.pieces)
    asked = engine.prefill(torch.tensor([ids]), known.state)
    assert asked is not None
    first_V = asked.logits_BV[0].double().log_softmax(-1)
    scores = {}
    for candidate in question.candidates:
        answer = encode(tokenizer, (f" {candidate}",))
        # the first token is judged by what is known already, the others by reading on
        score = float(first_V[answer[0]])
        if len(answer) > 1:
            answer_BT = torch.tensor([answer])
            losses_BT, _ = engine.token_losses(answer_BT[:, :-1], answer_BT[:, 1:], asked.state)
            score -= float(losses_BT.double().sum())
        # per token: longer words are no less likely for being long
        scores[candidate] = score / len(answer)
    right = scores[question.answer]
    # candidates that are as likely count as likelier: a model that knows nothing finds nothing
    rank = sum(score >= right - EQUAL for score in scores.values()) - 1
    return rank, _writes(engine, asked, encode(tokenizer, (f" {question.answer}",)))


def _writes(engine: Engine, known: Prefilled, answer: list[int]) -> bool:
    for token in answer:
        if int(known.logits_BV[0].argmax()) != token:
            return False
        known = engine.decode_one_token(torch.tensor([token]), known.state)
    return True


def measure_recall(
    engine: Engine,
    tokenizer: Tokenizer,
    cases: list[Case],
    *,
    told: Told | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Answer]:
    """Reads every text once, and asks each of its questions of a fork of the state after it.

    Raises:
        StoppedError: `stop` said so.
    """
    total, read = sum(case.length for case in cases), 0
    answers = []
    for case in cases:
        tokens_BT: Tensor = torch.tensor([case.tokens])
        known = engine.prefill(tokens_BT, engine.model.init_state(1), stop=stop)
        if known is None:
            raise StoppedError("the evaluation was stopped")
        for question in case.questions:
            rank, written = ask(engine, tokenizer, known, question)
            place = WORDS.index(question.answer)
            answers.append(Answer(case.task, case.length, question.depth, rank, written, place))
        read += case.length
        if told is not None:
            told("recall", read, total)
    return answers


def summarise(answers: list[Answer]) -> list[Recall]:
    """Per task and length, at all depths together and, where it has several, at each."""
    groups: dict[tuple[Task, int, float | None], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.task, answer.length, None].append(answer)
    for answer in answers:
        if answer.task in ("passkey", "needles"):
            groups[answer.task, answer.length, answer.depth].append(answer)
    places: dict[Task, Counter[int]] = defaultdict(Counter)
    for answer in answers:
        places[answer.task][answer.place] += 1
    found = []
    for (task, length, depth), group in groups.items():
        count = len(group)
        best_place = places[task].most_common(1)[0][0]
        found.append(
            Recall(
                *(task, length, depth, count),
                first=sum(answer.rank == 0 for answer in group) / count,
                mean_rank=sum(answer.rank for answer in group) / count,
                written=sum(answer.written for answer in group) / count,
                chance=1 / CANDIDATES,
                constant=sum(answer.place == best_place for answer in group) / count,
            )
        )
    return found
