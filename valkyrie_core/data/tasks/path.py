"""The shortest way through a small graph.

    ab bd ac ce de: a>e=ce

Edges go both ways. Only ends are asked between which there is one shortest way, so that one answer
is right; it has every node after the first.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import deque
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.tasks.task import MOST_DRAWS, Example

NODES = string.ascii_lowercase


class PathConfig(Config):
    """How large the graph is, and how far its ends are apart."""

    type: Literal["path"] = "path"
    level_key: ClassVar[str] = "distances"
    nodes: int = Field(default=8, ge=2, le=len(NODES))
    """Of the graph, each with a letter."""
    edges: int = Field(default=10, ge=1, le=100)
    """Between different nodes, that join them all."""
    distances: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Edges of the way; the levels of difficulty."""

    @model_validator(mode="after")
    def _distances_are_some(self) -> PathConfig:
        if min(self.distances) < 1 or max(self.distances) >= self.nodes:
            raise ValueError("distances are at least 1, and below the number of nodes")
        if self.edges < self.nodes - 1 or self.edges > self.nodes * (self.nodes - 1) // 2:
            raise ValueError("edges are enough to join all nodes, and no more than there are")
        return self

    @property
    def difficulties(self) -> tuple[int, ...]:
        """The distances."""
        return tuple(sorted(set(self.distances)))

    def sample(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One graph in which every node is reached, and two of its nodes.

        Raises ValueError where no graph of this size has such nodes.
        """
        for _ in range(MOST_DRAWS):
            edges = self._edges(draw)
            beside = _beside(edges)
            pairs = [
                (start, end)
                for start in sorted(beside)
                for end, (distance, ways) in _distances(beside, start).items()
                if distance == difficulty and ways == 1
            ]
            if pairs:
                break
        else:
            raise ValueError(f"no graph of {self.nodes} nodes and {self.edges} edges has such ends")
        start, end = pairs[int(draw.integers(len(pairs)))]
        turned = [edge if draw.integers(2) else edge[::-1] for edge in edges]
        text = " ".join(turned[i] for i in draw.permutation(len(turned)))
        canonical = " ".join(sorted("".join(sorted(edge)) for edge in edges))
        way = _way(beside, start, end)
        return Example(f"{text}: {start}>{end}=", way, difficulty, f"{canonical}: {start}>{end}")

    def holds(self, question: str, answer: str) -> bool:
        """Whether it is a way from end to end, and none is shorter."""
        found = re.fullmatch(r"([a-z]{2}(?: [a-z]{2})*): ([a-z])>([a-z])=", question.strip())
        if found is None:
            return False
        beside = _beside(found[1].split())
        nodes = found[2] + answer.strip()
        joined = all(b in beside.get(a, "") for a, b in itertools.pairwise(nodes))
        if not joined or nodes[-1] != found[3]:
            return False
        # all nodes that so many steps lead to, from the start on
        reached = {found[2]}
        for _ in range(len(nodes) - 2):
            reached |= {near for node in reached for near in beside.get(node, "")}
        return len(nodes) == 1 or found[3] not in reached

    def _edges(self, draw: np.random.Generator) -> list[str]:
        """A random tree, then edges between nodes that have none."""
        names = [NODES[i] for i in draw.permutation(self.nodes)]
        edges = {
            "".join(sorted((names[i], names[int(draw.integers(i))]))) for i in range(1, self.nodes)
        }
        free = [
            a + b
            for i, a in enumerate(NODES[: self.nodes])
            for b in NODES[i + 1 : self.nodes]
            if a + b not in edges
        ]
        more = draw.permutation(len(free))[: self.edges - len(edges)]
        return sorted(edges | {free[i] for i in more})


def _beside(edges: list[str]) -> dict[str, str]:
    """The nodes beside each node."""
    beside: dict[str, str] = {}
    for a, b in (tuple(edge) for edge in edges):
        beside[a] = beside.get(a, "") + b
        beside[b] = beside.get(b, "") + a
    return beside


def _distances(beside: Mapping[str, str], start: str) -> dict[str, tuple[int, int]]:
    """How far every node is, and in how many shortest ways it is reached."""
    found = {start: (0, 1)}
    waiting = deque([start])
    while waiting:
        node = waiting.popleft()
        distance, ways = found[node]
        for near in beside[node]:
            if near not in found:
                found[near] = (distance + 1, ways)
                waiting.append(near)
            elif found[near][0] == distance + 1:
                found[near] = (distance + 1, found[near][1] + ways)
    return found


def _way(beside: Mapping[str, str], start: str, end: str) -> str:
    """The nodes after the start on the shortest way, which is the only one."""
    from_end = _distances(beside, end)
    way, node = "", start
    while node != end:
        node = next(near for near in beside[node] if from_end[near][0] == from_end[node][0] - 1)
        way += node
    return way
