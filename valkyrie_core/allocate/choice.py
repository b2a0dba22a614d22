"""Which layouts go on, and which one is chosen: rules over scores, nothing trained here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from valkyrie_core.allocate.statistics import Mean, difference, mean_of, seeds_needed

TIE = 0.02
"""Shares of recalled queries that differ by less are a tie."""
LEARNED = 0.25
"""The share of the way from guessing to all queries at which recall has begun."""
WORST = float("inf")
CHOICE_RULE = (
    "of the candidates whose loss is within noise of the best one's (the 95 % interval of the "
    "difference, paired by seed, reaches zero), those that recall within 0.02 of the most; of "
    "these the one that reads the fewest bytes per decoded token"
)
RUNG_RULE = (
    "the better half by Pareto rank over loss, recall, decode bytes and training FLOPs (seed "
    "means), equal ranks by recall in steps of 0.02, then by loss; "
    "all-recurrent and all-attention always go on"
)


class Scored(NamedTuple):
    """A candidate with its scores by seed, and its costs at the recipe's full width."""

    name: str
    is_baseline: bool
    bpb: tuple[float, ...]
    """Bits per byte, lower is better; infinite where a training diverged."""
    recall: tuple[float, ...]
    """The share of queries that were answered, over all numbers of pairs."""
    decode_bytes: int
    training_flops: int

    @property
    def mean_bpb(self) -> Mean:
        """Over the seeds; infinite where one of them diverged."""
        if WORST in self.bpb:
            return Mean(WORST, None, len(self.bpb))
        return mean_of(self.bpb)

    @property
    def mean_recall(self) -> Mean:
        """Over the seeds."""
        return mean_of(self.recall)

    @property
    def objectives(self) -> tuple[float, float, float, float]:
        """What is compared, lower is better."""
        return (
            self.mean_bpb.value,
            -self.mean_recall.value,
            float(self.decode_bytes),
            float(self.training_flops),
        )


class Choice(NamedTuple):
    """The chosen candidate, or why there is none."""

    name: str | None
    reason: str
    seeds_needed: int | None = None
    """Where the evidence does not suffice: how many seeds may, if the spread stays as it is."""


def pareto_ranks(points: Sequence[tuple[float, ...]]) -> list[int]:
    """0 for points that no other one dominates, 1 for those that only these do, and so on.

    One point dominates another if it is nowhere higher and somewhere lower.
    """
    ranks = [-1] * len(points)
    rank = 0
    while -1 in ranks:
        left = [i for i, value in enumerate(ranks) if value == -1]
        for i in left:
            if not any(_dominates(points[j], points[i]) for j in left):
                ranks[i] = -2
        ranks = [rank if value == -2 else value for value in ranks]
        rank += 1
    return ranks


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def better_half(scored: Sequence[Scored]) -> list[str]:
    """The names that go on to the next rung, in their old order; see RUNG_RULE."""
    ranks = pareto_ranks([one.objectives for one in scored])
    order = sorted(
        range(len(scored)),
        key=lambda i: (
            # what diverged can't be chosen
            scored[i].mean_bpb.value == WORST,
            ranks[i],
            -round(scored[i].mean_recall.value / TIE),
            scored[i].mean_bpb.value,
        ),
    )
    going = set(order[: -(-len(scored) // 2)])
    going |= {i for i, one in enumerate(scored) if one.is_baseline}
    return [one.name for i, one in enumerate(scored) if i in going]


def choose(scored: Sequence[Scored], guessing: float) -> Choice:
    """The candidate that CHOICE_RULE picks; none where the seeds do not tell.

    They don't where a candidate that reads fewer bytes recalls less, but not surely less; nor where
    nobody recalls at all, since recall comes suddenly and a short training shows nothing of it.

    Args:
        guessing: the recall of a model that answers with any value of the problem.
    """
    able = [one for one in scored if max(one.bpb) < WORST]
    if not able:
        return Choice(None, "not enough evidence: every training diverged")
    if len(able[0].bpb) < 2:
        return Choice(None, "not enough evidence: one seed says nothing about noise", 3)
    learned = guessing + LEARNED * (1 - guessing)
    if max(one.mean_recall.value for one in able) < learned:
        return Choice(
            None,
            f"not enough evidence: no candidate recalls {learned:.3f} (guessing among a problem's "
            f"values: {guessing:.3f}) - more --recall-steps may show who can",
        )
    lowest = min(able, key=lambda one: one.mean_bpb.value)
    near = [one for one in able if difference(one.bpb, lowest.bpb).reaches_zero]
    most = max(near, key=lambda one: one.mean_recall.value)
    ties = [one for one in near if most.mean_recall.value - one.mean_recall.value < TIE]
    chosen = min(ties, key=lambda one: (one.decode_bytes, one.mean_bpb.value))
    unclear = [
        one
        for one in near
        if one not in ties
        and one.decode_bytes < chosen.decode_bytes
        and difference(chosen.recall, one.recall).reaches_zero
    ]
    if unclear:
        needed = [seeds_needed(_differences(chosen, one)) for one in unclear]
        names = ", ".join(one.name for one in unclear)
        return Choice(
            None,
            f"not enough evidence: {chosen.name} recalls most within noise of the best loss, but "
            f"{names} may recall as much and reads fewer bytes",
            None if None in needed else max(n for n in needed if n is not None),
        )
    return Choice(chosen.name, _reason(chosen, near, ties, scored))


def _differences(one: Scored, other: Scored) -> list[float]:
    return [a - b for a, b in zip(one.recall, other.recall, strict=True)]


def _reason(
    chosen: Scored, near: Sequence[Scored], ties: Sequence[Scored], scored: Sequence[Scored]
) -> str:
    parts = [
        f"loss within noise of the best: {', '.join(x.name for x in near)}",
        f"most recall among these, within {TIE}: {', '.join(x.name for x in ties)}",
        f"fewest bytes per decoded token of these: {chosen.name}",
    ]
    surely_less = [
        one.name
        for one in scored
        if one.is_baseline
        and one.name != chosen.name
        and difference(chosen.recall, one.recall).value > 0
        and not difference(chosen.recall, one.recall).reaches_zero
    ]
    if surely_less:
        parts.append(f"surely recalls more than {', '.join(surely_less)}")
    return "; ".join(parts)


def pareto_marks(scored: Sequence[Scored]) -> Mapping[str, bool]:
    """Whether no other candidate is better in one objective and as good in all."""
    ranks = pareto_ranks([one.objectives for one in scored])
    return {one.name: rank == 0 for one, rank in zip(scored, ranks, strict=True)}
