"""Questions with exact answers: what a task is, and which questions are held out.

A task's config describes it and makes its examples: `sample(draw, difficulty)` gives a question
and its only right answer, `correct(example, text)` scores what somebody else says. Training and
held-out questions are told apart by a hash of what a question asks, so that no seed and no range
of indices can mix them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, NamedTuple, Protocol

import numpy as np
from pydantic import AfterValidator, Field

MOST_DRAWS = 10_000
"""Draws of one example, after which a task counts as too small for its split."""


def _are_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if min(lengths) < 1 or max(lengths) > 4096:
        raise ValueError("lengths are between 1 and 4096")
    return lengths


Lengths = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_are_lengths)]
"""How long rows are."""


class Example(NamedTuple):
    """A question and its answer."""

    prompt: str
    """Ends where the answer begins."""
    answer: str
    """The only right one, without an end of line."""
    difficulty: int
    canonical: str
    """What is asked, however it is put: questions with the same are on one side of the split."""
    more: tuple[tuple[str, str], ...] = ()
    """Further questions about the same and their answers; they are trained on, never held out."""
    labels: str = ""
    """Of every character of the prompt, what is to be said after it; a space: nothing. They are
    trained on, never shown, and never asked of validation; each is the answer to the question
    whose `canonical` is the prompt so far, or where that answer begins."""


class Task(Protocol):
    """What every task's config can do."""

    level_key: ClassVar[str]
    """The key that says which levels there are."""

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The levels that are asked, easiest first."""
        ...

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One example of a level."""
        ...

    def holds(self, question: str, answer: str) -> bool:
        """Whether an answer is right, worked out from the question; nothing else is looked at."""
        ...


def correct(example: Example, text: str) -> bool:
    """Whether an answer is right: up to white space around it, exactly."""
    return text.strip() == example.answer


def is_held_out(canonical: str, fraction: float) -> bool:
    """Whether validation alone asks this, whoever draws it."""
    digest = hashlib.sha256(canonical.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def examples(
    task: Task, count: int, *, seed: int, held_out: bool, fraction: float
) -> Iterator[Example]:
    """So many examples, the levels taking turns; each is a function of seed and index alone.

    Raises ValueError where a level has no question on this side of the split.
    """
    levels = task.difficulties
    for index in range(count):
        draw = np.random.default_rng([seed, index, int(held_out)])
        difficulty = levels[index % len(levels)]
        for _ in range(MOST_DRAWS):
            example = task.sample(draw, difficulty)
            if is_held_out(example.canonical, fraction) == held_out:
                yield example
                break
        else:
            side = "held out" if held_out else "trained on"
            raise ValueError(f"no question of difficulty {difficulty} is {side}")


def constant_answer(train: Sequence[Example], asked: Sequence[Example]) -> float:
    """The share that one answer gets right: the most frequent one of the training questions."""
    counts: dict[str, int] = {}
    for example in train:
        counts[example.answer] = counts.get(example.answer, 0) + 1
    # of equal ones the first in the alphabet, whatever their order
    best = min(counts, key=lambda answer: (-counts[answer], answer))
    return sum(example.answer == best for example in asked) / len(asked)
