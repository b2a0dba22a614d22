"""Whether a model finds in a long text what it is asked for.

Facts are put into a text at known depths; then the text is asked for each. Text and facts follow
from a seed. A text is read once, and every question goes on from a fork of the state after it.
Small models never write a right answer, so that answers are ranked as well: by the log-probability
of the right one among candidates that were drawn from the same list.

Tasks, after RULER (Hsieh et al. 2024, arXiv 2404.06654) and Zoology (Arora et al. 2023,
arXiv 2312.04927):

    passkey     one fact at one depth
    needles     five facts at five depths, asked one by one
    mqar        sixteen pairs of words one after another, then the text, some of them asked
    variables   a value that is handed on three times, asked of the last

Shapes: B rows, T time.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import StoppedError
from valkyrie_core.evaluate.long_context import Told
from valkyrie_core.infer.engine import Engine, Prefilled

Task = Literal["passkey", "needles", "mqar", "variables"]
TASKS: tuple[Task, ...] = get_args(Task)
WORDS = (
    "apple", "anchor", "arrow", "basket", "bell", "bottle", "bridge", "candle", "castle",
    "chain", "cloud", "copper", "cradle", "crown", "desert", "dragon", "drum", "eagle",
    "ember", "feather", "field", "flame", "forest", "garden", "glass", "gold", "hammer",
    "harbour", "horse", "island", "jewel", "kettle", "ladder", "lantern", "lion", "marble",
    "meadow", "mirror", "mountain", "needle", "ocean", "orchard", "pearl", "pepper",
    "pillow", "prince", "rabbit", "ribbon", "river", "saddle", "shadow", "shield", "silver",
    "spider", "stone", "sword", "temple", "thunder", "tower", "valley", "velvet", "wagon",
    "winter", "wolf",
)  # fmt: skip
"""Keys and values are drawn from these."""
CANDIDATES = 16
"""Answers that are ranked, the right one among them."""
EQUAL = 1e-6
"""Nats per token between which scores are equal: they come from sums in fp32."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS, ASKED_PAIRS = 16, 4
HOPS = 3


class CrowdedError(ValueError):
    """The facts alone are longer than the text is to be."""


class Question(NamedTuple):
    """One question, and what the right answer is."""

    pieces: tuple[str, ...]
    """Tokenised apart."""
    answer: str
    candidates: tuple[str, ...]
    """The right answer and others, in no order."""
    depth: float | None
    """Where in the text the answer stands; None: at several places."""


class Case(NamedTuple):
    """A text with facts in it, and questions about them."""

    tokens: list[int]
    questions: list[Question]


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


def make_case(
    task: Task, length: int, depth: float, filler: list[int], tokenizer: Tokenizer, seed: str
) -> Case:
    """A text of at most `length` tokens, question not counted.

    Args:
        depth: where the one fact of a passkey stands; the other tasks spread theirs.
        filler: tokens of the text around the facts, enough of them.
        seed: everything follows from it.

    Raises:
        CrowdedError: the facts alone are longer than `length`.
        ValueError: the filler is too short.
    """
    draw = random.Random(f"{seed}/{task}/{length}/{depth}")
    facts, questions = _facts(task, depth, draw)
    pieces = [(at, _encode(tokenizer, fact)) for at, fact in facts]
    marker = [tokenizer.special_id("<|doc|>")]
    room = length - len(marker) - sum(len(ids) for _, ids in pieces)
    if room < 0:
        raise CrowdedError(f"the facts of {task} do not fit in {length} tokens")
    if len(filler) < room:
        raise ValueError(f"{len(filler)} tokens of text can't fill {room}")
    start = draw.randrange(len(filler) - room + 1)
    text = filler[start : start + room]
    tokens, used = marker, 0
    for at, ids in sorted(pieces, key=lambda piece: piece[0]):
        end = round(at * room)
        tokens = [*tokens, *text[used:end], *ids]
        used = end
    return Case([*tokens, *text[used:]], questions)


def _facts(
    task: Task, depth: float, draw: random.Random
) -> tuple[list[tuple[float, tuple[str, ...]]], list[Question]]:
    """Facts and their depths, each in pieces that are tokenised apart, and the questions."""
    words = draw.sample(WORDS, len(WORDS))
    if task == "variables":
        # a value that is handed from name to name
        names, value = words[: HOPS + 1], words[HOPS + 1]
        facts = [(0.0, _fact(names[0], value))]
        for hop in range(HOPS):
            handed = ("\nThe word of", f" {names[hop + 1]}", " is that of", f" {names[hop]}", ".\n")
            facts.append(((hop + 1) / HOPS, handed))
        return facts, [_question(names[-1], value, None, draw)]
    if task == "mqar":
        keys, values = words[:PAIRS], words[PAIRS : 2 * PAIRS]
        facts = [(0.0, _fact(key, value)) for key, value in zip(keys, values, strict=True)]
        asked = draw.sample(range(PAIRS), ASKED_PAIRS)
        return facts, [_question(keys[i], values[i], 0.0, draw) for i in asked]
    depths = (depth,) if task == "passkey" else DEPTHS
    keys, values = words[: len(depths)], words[len(depths) : 2 * len(depths)]
    facts = [(at, _fact(*pair)) for at, *pair in zip(depths, keys, values, strict=True)]
    return facts, [
        _question(key, value, at, draw) for at, key, value in zip(depths, keys, values, strict=True)
    ]


def _fact(key: str, value: str) -> tuple[str, ...]:
    return ("\nThe word of", f" {key}", " is", f" {value}", ".\n")


def _question(key: str, value: str, depth: float | None, draw: random.Random) -> Question:
    others = draw.sample([word for word in WORDS if word != value], CANDIDATES - 1)
    candidates = draw.sample([value, *others], CANDIDATES)
    return Question(("\nThe word of", f" {key}", " is"), value, tuple(candidates), depth)


def _encode(tokenizer: Tokenizer, pieces: Iterable[str]) -> list[int]:
    """Pieces one by one: a fact has the same tokens as the question about it."""
    return [token for piece in pieces for token in tokenizer.encode(piece)]


def ask(
    engine: Engine, tokenizer: Tokenizer, known: Prefilled, question: Question
) -> tuple[int, bool]:
    """The rank of the right answer, and whether the model writes it; `known` stays as it is."""
    ids = _encode(tokenizer, question.pieces)
    asked = engine.prefill(torch.tensor([ids]), known.state)
    assert asked is not None
    first_V = asked.logits_BV[0].double().log_softmax(-1)
    scores = {}
    for candidate in question.candidates:
        answer = _encode(tokenizer, (f" {candidate}",))
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
    return rank, _writes(engine, asked, _encode(tokenizer, (f" {question.answer}",)))


def _writes(engine: Engine, known: Prefilled, answer: list[int]) -> bool:
    for token in answer:
        if int(known.logits_BV[0].argmax()) != token:
            return False
        known = engine.decode_one_token(torch.tensor([token]), known.state)
    return True


def measure_recall(
    engine: Engine,
    tokenizer: Tokenizer,
    filler: list[int],
    lengths: list[int],
    *,
    repeats: int = 2,
    seed: int = 0,
    told: Told | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Answer]:
    """Asks all questions of all tasks, at every length that holds their facts.

    Args:
        filler: tokens of the text around the facts; at least as many as the longest length.
        repeats: texts per task, length, and depth of the passkey.

    Raises:
        ValueError: the filler is too short.
        StoppedError: `stop` said so.
    """
    plan = [
        (length, task, depth, repeat)
        for length in lengths
        for task in TASKS
        for depth in (DEPTHS if task == "passkey" else (0.0,))
        for repeat in range(repeats)
    ]
    total, read = sum(length for length, *_ in plan), 0
    answers = []
    for length, task, depth, repeat in plan:
        try:
            case = make_case(task, length, depth, filler, tokenizer, f"{seed}/{repeat}")
        except CrowdedError:
            continue
        tokens_BT: Tensor = torch.tensor([case.tokens])
        known = engine.prefill(tokens_BT, engine.model.init_state(1), stop=stop)
        if known is None:
            raise StoppedError("the evaluation was stopped")
        for question in case.questions:
            rank, written = ask(engine, tokenizer, known, question)
            place = WORDS.index(question.answer)
            answers.append(Answer(task, length, question.depth, rank, written, place))
        read += length
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
