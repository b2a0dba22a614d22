"""Texts with facts in them and questions about the facts; all of it follows from a seed.

Tasks, after RULER (Hsieh et al. 2024, arXiv 2404.06654) and Zoology (Arora et al. 2023,
arXiv 2312.04927):

    passkey     one fact at one depth
    needles     five facts at five depths, asked one by one
    mqar        sixteen pairs of words one after another, then the text, some of them asked
    variables   a value that is handed on three times, asked of the last
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from valkyrie_core.data.cache import cached, fingerprint
from valkyrie_core.data.tokenizer import Tokenizer, opening

FORMAT = 1
"""Of the cached cases; a change of what they hold needs another."""
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

    task: Task
    length: int
    """Tokens that the text was to have; the facts and the text around them."""
    tokens: list[int]
    questions: list[Question]


def make_case(
    task: Task,
    length: int,
    depth: float,
    filler: list[int],
    tokenizer: Tokenizer,
    seed: str,
    memory_tokens: int = 0,
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
    pieces = [(at, encode(tokenizer, fact)) for at, fact in facts]
    marker = opening(tokenizer, memory_tokens)
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
    return Case(task, length, [*tokens, *text[used:]], questions)


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


def encode(tokenizer: Tokenizer, pieces: Iterable[str]) -> list[int]:
    """Pieces one by one: a fact has the same tokens as the question about it."""
    return [token for piece in pieces for token in tokenizer.encode(piece)]


def make_cases(
    tokenizer: Tokenizer,
    filler: list[int],
    lengths: list[int],
    *,
    repeats: int = 2,
    seed: int = 0,
    memory_tokens: int = 0,
) -> list[Case]:
    """Every task at every length that holds its facts.

    Args:
        filler: tokens of the text around the facts; at least as many as the longest length.
        repeats: texts per task, length, and depth of the passkey.

    Raises:
        ValueError: the filler is too short.
    """
    found = []
    for length in lengths:
        for task in TASKS:
            for depth in DEPTHS if task == "passkey" else (0.0,):
                for repeat in range(repeats):
                    try:
                        own = f"{seed}/{repeat}"
                        case = make_case(task, length, depth, filler, tokenizer, own, memory_tokens)
                    except CrowdedError:
                        continue
                    found.append(case)
    return found


def cached_cases(
    root: Path,
    tokenizer: Tokenizer,
    filler: list[int],
    lengths: list[int],
    *,
    repeats: int = 2,
    seed: int = 0,
    memory_tokens: int = 0,
) -> list[Case]:
    """As `make_cases`, kept below `root`: whoever asks again asks exactly the same."""
    text = fingerprint(filler)
    memory = [memory_tokens] if memory_tokens else []
    key = fingerprint([FORMAT, tokenizer.fingerprint, text, lengths, repeats, seed, *memory])

    def write(directory: Path) -> dict[str, Any]:
        cases = make_cases(
            tokenizer, filler, lengths, repeats=repeats, seed=seed, memory_tokens=memory_tokens
        )
        rows = [[*case[:3], [list(question) for question in case.questions]] for case in cases]
        (directory / "cases.json").write_text(json.dumps(rows), encoding="utf-8")
        return {"seed": seed, "repeats": repeats, "lengths": lengths}

    def read(directory: Path, _content: dict[str, Any]) -> list[Case]:
        rows = json.loads((directory / "cases.json").read_text(encoding="utf-8"))
        return [
            Case(
                task,
                length,
                tokens,
                [
                    Question(tuple(pieces), answer, tuple(candidates), depth)
                    for pieces, answer, candidates, depth in questions
                ],
            )
            for task, length, tokens, questions in rows
        ]

    return cached(root, "recall", key, write, read)[1]
