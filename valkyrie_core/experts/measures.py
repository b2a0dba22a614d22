"""What is said about a router, as pure functions over counts of what it chose.

A measure of too little data is None, never 0. Logarithms are natural.

Shapes: E experts, G domains of text, W windows of text, R tokens, K slots of a token, C rounds of a
layer, S shuffles, V kinds of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Choices = npt.NDArray[np.int16]
"""[R, K] the experts of every token; -1 in a slot that is not used."""

DEAD_SHARE = 0.1
"""An expert with less than this share of a fair load counts as dead, as it does in training."""
LEAST_LABELLINGS = 40
"""Ways to hand out the domains' names below which a 95th percentile means nothing."""
LEAST_WINDOWS = 5
"""Windows below which a bootstrap means nothing."""
RESAMPLES = 2000


class Null(NamedTuple):
    """What a measure is where there is nothing to find."""

    mean: float
    high: float
    """The 95th percentile."""


class Lift(NamedTuple):
    """A kind of token that an expert is fond of."""

    token: int
    met: int
    """How many of them the expert met."""
    lift: float
    """Its share of these tokens over its share of all tokens."""


def loads(experts_RK: Choices, num_experts: int) -> Ints:
    """[E] how many tokens met each expert."""
    return np.bincount(experts_RK[experts_RK >= 0], minlength=num_experts)


def over_ideal(load_E: npt.NDArray[Any]) -> Floats | None:
    """[E] the load over a fair one: 1 is fair, 0 is dead. None without load."""
    mean = load_E.mean()
    return None if mean == 0 else load_E / mean


def variation(load_E: npt.NDArray[Any]) -> float | None:
    """The coefficient of variation: standard deviation over mean."""
    shares_E = over_ideal(load_E)
    return None if shares_E is None else float(shares_E.std())


def max_vio(load_E: npt.NDArray[Any]) -> float | None:
    """(largest load - mean) / mean: 0 to E - 1 (Wang et al. 2024, arXiv 2408.15664)."""
    shares_E = over_ideal(load_E)
    return None if shares_E is None else float(shares_E.max()) - 1


def mean_max_vio(loads_WE: npt.NDArray[Any]) -> float | None:
    """The mean over batches of each one's MaxVio; those without load are left out."""
    found = [value for load_E in loads_WE if (value := max_vio(load_E)) is not None]
    return sum(found) / len(found) if found else None


def entropy(load_E: npt.NDArray[Any]) -> float | None:
    """Of the shares of the load, in nats: 0 to ln E."""
    total = load_E.sum()
    if total == 0:
        return None
    p_E = load_E[load_E > 0] / total
    # no -0.0
    return abs(float((p_E * np.log(p_E)).sum()))


def effective_experts(load_E: npt.NDArray[Any]) -> float | None:
    """exp(entropy): how many experts that are used alike would be as diverse; 1 to E."""
    nats = entropy(load_E)
    return None if nats is None else math.exp(nats)


def dead(load_E: npt.NDArray[Any]) -> list[int]:
    """The experts with less than a tenth of a fair load; none where there is no load."""
    shares_E = over_ideal(load_E)
    return [] if shares_E is None else [int(e) for e in np.flatnonzero(shares_E < DEAD_SHARE)]


def mutual_information(counts_GE: npt.NDArray[Any]) -> float | None:
    """I(expert; domain) / H(domain): 0 if domains are routed alike, 1 if a choice tells its domain.

    None where there are not two domains.
    """
    p_GE = counts_GE / max(counts_GE.sum(), 1)
    p_G, p_E = p_GE.sum(1), p_GE.sum(0)
    of_domain = entropy(p_G)
    if not of_domain:
        return None
    there = p_GE > 0
    ratio = p_GE[there] / np.outer(p_G, p_E)[there]
    return max(0.0, float((p_GE[there] * np.log(ratio)).sum())) / of_domain


def shuffled_information(
    counts_WE: npt.NDArray[Any], domain_W: Ints, *, shuffles: int, seed: int
) -> Null | None:
    """`mutual_information` where the windows' domains are shuffled: what chance alone gives.

    Whole windows are shuffled, since tokens of one text resemble each other. None where there are
    too few windows for as many ways to do so as a percentile needs.
    """
    sizes_G = np.bincount(domain_W)
    ways = math.lgamma(len(domain_W) + 1) - sum(math.lgamma(n + 1) for n in sizes_G)
    # the least labellings, less what the logarithms may be off
    if (sizes_G > 0).sum() < 2 or ways < math.log(LEAST_LABELLINGS) - 1e-6:
        return None
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(shuffles):
        labels_W = generator.permutation(domain_W)
        value = mutual_information(by_domain(counts_WE, labels_W, len(sizes_G)))
        found.append(math.nan if value is None else value)
    if not np.isfinite(found).all():
        return None
    return Null(float(np.mean(found)), float(np.quantile(found, 0.95)))


def by_domain(counts_WE: npt.NDArray[Any], domain_W: Ints, num_domains: int) -> npt.NDArray[Any]:
    """[G, E] the counts of all windows of each domain."""
    of_GW = domain_W == np.arange(num_domains)[:, None]
    return np.asarray(of_GW.astype(counts_WE.dtype) @ counts_WE)


def pair_counts(experts_RK: Choices, num_experts: int) -> Ints:
    """[E, E] how many tokens met both; symmetric, the load on the diagonal."""
    met_RE = np.zeros((len(experts_RK), num_experts + 1), dtype=np.float32)
    np.put_along_axis(met_RE, experts_RK.astype(np.int64) % (num_experts + 1), 1, axis=1)
    met_RE = met_RE[:, :num_experts]
    # exact: no count reaches 2 to the 24
    return (met_RE.T @ met_RE).astype(np.int64)


def co_activation(pairs_CEE: Ints) -> list[list[float | None]] | None:
    """[E, E] how often two experts meet one token, over chance; None on the diagonal.

    Chance: pairs that are as many, their experts independent of each other. Plain N_i N_j / R would
    not do: a token's experts differ, so that even a random router would stay below it. Of several
    rounds, pairs within one. None where no token has two experts.
    """
    counts_EE = np.zeros(pairs_CEE.shape[1:])
    chance_EE = np.zeros(pairs_CEE.shape[1:])
    for pairs_EE in pairs_CEE:
        load_E = pairs_EE.diagonal().astype(np.float64)
        apart_EE = pairs_EE - np.diag(pairs_EE.diagonal())
        product_EE = np.outer(load_E, load_E) - np.diag(load_E**2)
        counts_EE += apart_EE
        if product_EE.sum():
            chance_EE += product_EE * (apart_EE.sum() / product_EE.sum())
    if not counts_EE.sum():
        return None
    return [
        [
            float(count / chance) if chance > 0 else None
            for count, chance in zip(counts_E, chance_E, strict=True)
        ]
        for counts_E, chance_E in zip(counts_EE, chance_EE, strict=True)
    ]


def top_tokens(
    tokens_R: Ints, experts_RK: Choices, num_experts: int, *, count: int, least: int
) -> list[list[Lift]]:
    """For every expert the `count` kinds of tokens of the greatest lift, that it met `least` times.

    Lift: the share of a kind that meets the expert over the share of all tokens that do. Of equal
    ones the more frequent first, then the smaller id.
    """
    kinds_V, kind_R = np.unique(tokens_R, return_inverse=True)
    total_V = np.bincount(kind_R, minlength=len(kinds_V))
    slots = experts_RK.shape[1]
    entry_kinds, entry_experts = np.repeat(kind_R, slots), experts_RK.flatten().astype(np.int64)
    used = entry_experts >= 0
    found: list[list[Lift]] = []
    for expert in range(num_experts):
        met_V = np.bincount(entry_kinds[used & (entry_experts == expert)], minlength=len(kinds_V))
        share = met_V.sum() / max(len(tokens_R), 1)
        often_V = np.flatnonzero(met_V >= max(least, 1))
        lifts = [
            Lift(int(kinds_V[v]), int(met_V[v]), float(met_V[v] / total_V[v] / share))
            for v in often_V
        ]
        lifts.sort(key=lambda one: (-one.lift, -one.met, one.token))
        found.append(lifts[:count])
    return found


def agreement(now_RK: Choices, before_RK: Choices) -> float | None:
    """The share of a token's experts that an earlier router chose as well; mean over tokens.

    |earlier and now| / |now| (Muennighoff et al. 2024, arXiv 2409.02060: router saturation).
    """
    if not len(now_RK):
        return None
    used_RK = now_RK >= 0
    same_RK = (now_RK[:, :, None] == before_RK[:, None, :]).any(-1) & used_RK
    return float((same_RK.sum(1) / used_RK.sum(1)).mean())


def gini(values: Sequence[float]) -> float | None:
    """How unequal numbers are: 0 if all are alike, 1 if one has everything.

    The Gini coefficient times n / (n - 1). Negative numbers count as 0; None where nothing is left.
    """
    sorted_E = np.sort(np.clip(np.asarray(values, dtype=np.float64), 0, None))
    total, n = sorted_E.sum(), len(sorted_E)
    if total == 0 or n < 2:
        return None
    places_E = np.arange(1, n + 1)
    coefficient = (2 * (places_E * sorted_E).sum() / total - (n + 1)) / n
    return float(max(0.0, coefficient) * n / (n - 1))


def intervals(change_EW: Floats, tokens_W: Ints, *, seed: int) -> list[tuple[float, float]] | None:
    """The 95 % percentile interval of every expert's summed changes per token.

    Windows are resampled, the same ones for all experts. None where they are too few.
    """
    there_W = tokens_W > 0
    change_EW, tokens_W = change_EW[:, there_W], tokens_W[there_W]
    count = len(tokens_W)
    if count < LEAST_WINDOWS:
        return None
    times_SW = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=RESAMPLES
    )
    means_ES = change_EW @ times_SW.T / (times_SW @ tokens_W)
    low_E, high_E = np.quantile(means_ES, [0.025, 0.975], axis=1)
    return list(zip(low_E.tolist(), high_E.tolist(), strict=True))
