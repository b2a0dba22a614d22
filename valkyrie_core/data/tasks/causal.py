"""Small structural causal models of gates: what is seen, what is done, what would have been.

    a? b? c=a&b d=!c: see d=0; a=1
    a? b? c=a&b d=!c: do d=0; a=?
    a? b? c=a&b d=!c: see d=0; do b=0; d=1

`a?` is a coin that was tossed unseen; every other name follows from those before it. `see` tells
what a name turned out to be, and so something of what it follows from; `do` sets it, whatever it
follows from, and so tells nothing of that. Both together ask what would have been: the coins are
those of the world that was seen (Pearl 2009, Causality, ch. 7). The answer is 0 or 1 where it is
certain, else ?; it is found by going through all tosses of the coins.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import MOST_DRAWS, Example

NAMES = string.ascii_lowercase
UNCERTAIN = "?"
PATIENCE = 50
"""Models that are tried for a question of the wanted kind."""
Query = Literal["see", "do", "both"]
Gate = tuple[str, str, str]
"""What it does (& | ^ or ! of the first alone), and the names that it follows from."""


class CausalConfig(Config):
    """How large the models are, and what is asked of them."""

    type: Literal["causal"] = "causal"
    level_key: ClassVar[str] = "gates"
    coins: int = Field(default=2, ge=1, le=8)
    """Names that follow from nothing."""
    gates: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Names that follow from others; the levels of difficulty."""
    queries: tuple[Query, ...] = Field(default=("see", "do", "both"), min_length=1)
    """see: given what was seen. do: where something is set. both: had it been set, given what was
    seen."""

    @model_validator(mode="after")
    def _names_are_enough(self) -> CausalConfig:
        if min(self.gates) < 1 or max(self.gates) + self.coins > len(NAMES):
            raise ValueError(f"gates are at least 1, and with the coins at most {len(NAMES)}")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The numbers of gates."""
        return tuple(sorted(set(self.gates)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One question about a model. Its answer is drawn first, or it is one that only holds
        because something is done."""
        query = self.queries[int(draw.integers(len(self.queries)))]
        wanted = ("0", "1", UNCERTAIN)[int(draw.integers(3))]
        # in half of the questions what is done is what matters
        matters = query != "see" and bool(draw.integers(2))
        for attempt in range(MOST_DRAWS):
            coins, gates = self._model(draw, difficulty)
            names = [*coins, *gates]
            # what could have been seen: the world of some toss
            world = _world(coins, gates, tuple(draw.integers(2, size=len(coins)).tolist()), {})
            seen, done, asked = (names[i] for i in draw.integers(len(names), size=3))
            given = {seen: world[seen]} if query != "do" else {}
            set_to = {done: int(draw.integers(2))} if query != "see" else {}
            if asked in set_to or (query == "see" and asked in given):
                continue
            answer = _answer(coins, gates, given, set_to, asked)
            if matters:
                # had the same been seen, or nothing been done
                fits = answer != _answer(coins, gates, given or set_to, {}, asked)
            else:
                fits = answer == wanted
            # some sizes have no such question: after a while any will do
            if fits or attempt > PATIENCE:
                break
        else:
            raise ValueError("no model has a question")
        model = " ".join([f"{coin}?" for coin in coins] + [_told(n, g) for n, g in gates.items()])
        told = [f"see {name}={value}" for name, value in given.items()]
        told += [f"do {name}={value}" for name, value in set_to.items()]
        prompt = f"{model}: {'; '.join(told)}; {asked}="
        return Example(prompt, answer, difficulty, prompt)

    def holds(self, question: str, answer: str) -> bool:
        """Whether all tosses that agree with what was seen say so, worked out from the text."""
        found = re.fullmatch(r"([^:]+): (.+); ([a-z])=", question.strip())
        if found is None:
            return False
        coins = re.findall(r"([a-z])\?", found[1])
        gates = dict(re.findall(r"([a-z])=(\S+)", found[1]))
        given = dict(re.findall(r"see ([a-z])=([01])", found[2]))
        set_to = dict(re.findall(r"do ([a-z])=([01])", found[2]))
        said = set()
        for toss in itertools.product("01", repeat=len(coins)):
            was, would = dict(zip(coins, toss, strict=True)), dict(zip(coins, toss, strict=True))
            for world, changes in ((was, {}), (would, set_to)):
                world |= {name: value for name, value in changes.items() if name in coins}
                for name, formula in gates.items():
                    # a gate's text is Python's, of the values that stand before it
                    inputs = {x: int(world[x]) for x in re.findall("[a-z]", formula)}
                    python = formula.replace("!", "1^")
                    world[name] = changes.get(name) or str(_worked_out(python, inputs))
            if all(was.get(name) == value for name, value in given.items()):
                said.add(would.get(found[3]))
        right = said.pop() if len(said) == 1 else UNCERTAIN if said else None
        return right == answer.strip()

    def _model(
        self, draw: np.random.Generator, difficulty: int
    ) -> tuple[tuple[str, ...], dict[str, Gate]]:
        names = [NAMES[i] for i in draw.permutation(len(NAMES))[: self.coins + difficulty]]
        gates: dict[str, Gate] = {}
        for place in range(self.coins, len(names)):
            gate = "&|^!"[int(draw.integers(4))] if place > 1 else "!"
            first, second = draw.permutation(place)[:2] if place > 1 else (0, 0)
            gates[names[place]] = (gate, names[int(first)], names[int(second)])
        return tuple(names[: self.coins]), gates


def _told(name: str, gate: Gate) -> str:
    does, first, second = gate
    return f"{name}=!{first}" if does == "!" else f"{name}={first}{does}{second}"


def _worked_out(formula: str, inputs: Mapping[str, int]) -> int:
    """Of two names and a sign between them, or of a one and a name."""
    first, sign, second = list(formula)
    a, b = (1 if x == "1" else inputs[x] for x in (first, second))
    return {"&": min(a, b), "|": max(a, b), "^": (a + b) % 2}[sign]


def _world(
    coins: Sequence[str], gates: Mapping[str, Gate], toss: Sequence[int], set_to: Mapping[str, int]
) -> dict[str, int]:
    """The value of every name."""
    world = {coin: set_to.get(coin, value) for coin, value in zip(coins, toss, strict=True)}
    for name, (does, first, second) in gates.items():
        a, b = world[first], world[second]
        value = {"&": a & b, "|": a | b, "^": a ^ b, "!": 1 - a}[does]
        world[name] = set_to.get(name, value)
    return world


def _answer(
    coins: Sequence[str],
    gates: Mapping[str, Gate],
    given: Mapping[str, int],
    set_to: Mapping[str, int],
    asked: str,
) -> str:
    """What is certain of a name, of all tosses by which what was seen comes about."""

    def values() -> Iterator[int]:
        for toss in itertools.product((0, 1), repeat=len(coins)):
            was = _world(coins, gates, toss, {})
            if all(was[name] == value for name, value in given.items()):
                yield _world(coins, gates, toss, set_to)[asked]

    possible = set(values())
    return str(possible.pop()) if len(possible) == 1 else UNCERTAIN
