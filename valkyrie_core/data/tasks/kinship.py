"""What one person is to another, by way of those between them.

    c son b; e father a; b son a; d sister c: d a=granddaughter

`b son a` says that b is the son of a. Siblings have both parents in common, and people have names
of their own, so that the steps between two of them compose to one relation: parents of parents
upward, at most one sibling, children of children downward (the composition of kinship that CLUTRR
asks for, Sinha et al. 2019, arXiv 1908.06177, with a table of our own that has no exceptions).
"""

from __future__ import annotations

import re
import string
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import Example

PEOPLE = string.ascii_lowercase
STEPS = {"parent": ("mother", "father"), "child": ("daughter", "son"), "sib": ("sister", "brother")}
"""What is told of two people, of a woman and of a man."""


class Kin(NamedTuple):
    """Generations up from the other person to the nearest common ones, and down from there."""

    up: int
    down: int


class KinshipConfig(Config):
    """How many people lie between, and how much is told besides."""

    type: Literal["kinship"] = "kinship"
    level_key: ClassVar[str] = "hops"
    facts: int = Field(default=8, ge=1, le=len(PEOPLE) - 1)
    """That are told; those that nothing hangs on are about others."""
    hops: tuple[int, ...] = Field(default=(2, 3), min_length=1)
    """Facts between the two who are asked about; the levels of difficulty."""

    @model_validator(mode="after")
    def _hops_are_told(self) -> KinshipConfig:
        if min(self.hops) < 1 or max(self.hops) > self.facts:
            raise ValueError("hops are at least 1, and no more than facts")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The numbers of hops."""
        return tuple(sorted(set(self.hops)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One question; every relation that so many steps make is as likely as another."""
        sib = int(draw.integers(2)) if difficulty > 1 else int(draw.integers(3) == 0)
        left = difficulty - sib
        # up and down again needs a sibling: else it might lead to the same person
        ups = int(draw.integers(left + 1)) if sib else left * int(draw.integers(2))
        kinds = ["parent"] * ups + ["sib"] * sib + ["child"] * (left - ups)
        names = [PEOPLE[i] for i in draw.permutation(len(PEOPLE))[: self.facts + 1]]
        women = dict(zip(names, draw.integers(2, size=len(names)).tolist(), strict=True))
        chain = names[: difficulty + 1]

        def told(who: str, kind: str, of: str) -> str:
            return f"{who} {STEPS[kind][1 - women[who]]} {of}"

        facts = [told(chain[i + 1], kind, chain[i]) for i, kind in enumerate(kinds)]
        for place in range(difficulty + 1, len(names)):
            # about people of the chain as well, so that one has to look where a step leads
            other = names[int(draw.integers(place))]
            facts.append(told(names[place], list(STEPS)[int(draw.integers(3))], other))
        text = "; ".join(facts[i] for i in draw.permutation(len(facts)))
        kin = Kin(ups + sib, left - ups + sib)
        question = f"{text}: {chain[-1]} {chain[0]}="
        canonical = f"{'; '.join(sorted(facts))}: {chain[-1]} {chain[0]}"
        return Example(question, named(kin, bool(women[chain[-1]])), difficulty, canonical)

    def holds(self, question: str, answer: str) -> bool:
        """Whether the facts between the two compose to that."""
        found = re.fullmatch(r"([^:]+): ([a-z]) ([a-z])=", question.strip())
        facts = [fact.split() for fact in found[1].split("; ")] if found else []
        if found is None or not all(len(fact) == 3 for fact in facts):
            return False
        kinds = {word: kind for kind, words in STEPS.items() for word in words}
        # what everybody who can be reached is to the other person
        known, women = {found[3]: Kin(0, 0)}, set()
        for _ in facts:
            for who, word, of in facts:
                women |= {who} if word in {words[0] for words in STEPS.values()} else set()
                if of in known and who not in known and word in kinds:
                    kin = _then(known[of], kinds[word])
                    if kin is not None:
                        known[who] = kin
        kin = known.get(found[2])
        return kin not in (None, Kin(0, 0)) and answer.strip() == named(kin, found[2] in women)


def _then(kin: Kin, kind: str) -> Kin | None:
    """What the parent, child or sibling of such a relative is; None where it may be several."""
    if kind == "parent":
        return Kin(kin.up + 1, 0) if kin.down == 0 else None
    if kind == "child":
        # a child of an ancestor may be an ancestor
        return Kin(kin.up, kin.down + 1) if kin.up == 0 or kin.down else None
    if kin.down == 0:
        return Kin(kin.up + 1, 1)
    # a sibling of a child or of a niece is one as well; one of a sibling may be the person
    return kin if kin.up == 0 or kin.down > 1 else None


def named(kin: Kin, woman: bool) -> str:
    """The word for it; cousins have a degree and generations between: `cousin 1.0`."""
    up, down = kin
    if up > 1 and down > 1:
        return f"cousin {min(kin) - 1}.{abs(up - down)}"
    if down == 0:
        return _far("mother" if woman else "father", up, "grand")
    if up == 0:
        return _far("daughter" if woman else "son", down, "grand")
    if up == 1 and down == 1:
        return "sister" if woman else "brother"
    if down == 1:
        return _far("aunt" if woman else "uncle", up - 1, "great-")
    return _far("niece" if woman else "nephew", down - 1, "great-")


def _far(word: str, generations: int, first: str) -> str:
    """mother, grandmother, great-grandmother ...; aunt, great-aunt, great-great-aunt ..."""
    return "great-" * max(0, generations - 2) + (first if generations > 1 else "") + word
