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
FITS = 1000
"""Rounds in which weights are fitted to loads, at most."""
LEAST_LOAD = 30
"""A fair load below which nobody can be told to be dead."""


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


def dead(load_E: npt.NDArray[Any]) -> list[int] | None:
    """The experts with less than a tenth of a fair load; None where a fair load is so small that
    chance could starve one."""
    shares_E = over_ideal(load_E)
    if shares_E is None or load_E.mean() < LEAST_LOAD:
        return None
    return [int(e) for e in np.flatnonzero(shares_E < DEAD_SHARE)]


def experts_per_token(experts_RK: Choices) -> float:
    """How many experts a token met, mean."""
    return float((experts_RK >= 0).sum(1).mean())


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


def co_activation(
    rounds_CRK: Sequence[Choices], num_experts: int
) -> list[list[float | None]] | None:
    """[E, E] how often two experts meet one token, over chance; None on the diagonal.

    Of several rounds, pairs within one. None where no token has two experts. See `chance_pairs`.
    """
    counts_EE = np.zeros((num_experts, num_experts))
    chance_EE = np.zeros((num_experts, num_experts))
    for experts_RK in rounds_CRK:
        pairs_EE = pair_counts(experts_RK, num_experts)
        counts_EE += pairs_EE - np.diag(pairs_EE.diagonal())
        used_R = (experts_RK >= 0).sum(1)
        chance_EE += chance_pairs(pairs_EE.diagonal(), np.bincount(used_R))
    if not counts_EE.sum():
        return None
    return [
        [
            float(count / chance) if chance > 0 else None
            for count, chance in zip(counts_E, chance_E, strict=True)
        ]
        for counts_E, chance_E in zip(counts_EE, chance_EE, strict=True)
    ]


def chance_pairs(load_E: Ints, tokens_K: Ints) -> Floats:
    """[E, E] the tokens that meet both experts, if nothing but their loads decided; diagonal 0.

    A token's experts differ, so a product of loads would not do. Among all ways to choose that
    have these loads, the one of the greatest entropy: a set of k experts with a probability in
    proportion to the product of its experts' weights (Chen, Dempster and Liu 1994), which are
    fitted to the loads.

    Args:
        load_E: tokens that met each expert.
        tokens_K: how many tokens met 0, 1, 2, ... experts.
    """
    E = len(load_E)
    chance_EE = np.zeros((E, E))
    sizes = [k for k in range(2, len(tokens_K)) if tokens_K[k]]
    used = np.flatnonzero(load_E)
    if not sizes or len(used) < 2:
        return chance_EE
    wanted = load_E[used].astype(np.float64)
    weights, others = wanted / wanted.max(), ~np.eye(len(used), dtype=bool)
    most = len(tokens_K) - 1
    for _ in range(FITS):
        # P[i, k]: all sets of k of the others than i, each worth the product of its weights
        without = _set_sums(np.where(others, weights, 0.0), most)
        total = _set_sums(weights[None], most)[0]
        expected = sum(
            tokens_K[k] * weights * without[:, k - 1] / total[k]
            for k in range(1, most + 1)
            if tokens_K[k]
        )
        if np.abs(expected / wanted - 1).max() < 1e-6:
            break
        weights = weights * wanted / expected
        weights /= weights.max()
    first, second = np.triu_indices(len(used), 1)
    both = np.ones((len(first), len(used)), dtype=bool)
    both[np.arange(len(first)), first] = both[np.arange(len(first)), second] = False
    rest = _set_sums(np.where(both, weights, 0.0), most)
    total = _set_sums(weights[None], most)[0]
    pairs = sum(tokens_K[k] * rest[:, k - 2] / total[k] for k in sizes)
    chance_EE[used[first], used[second]] = weights[first] * weights[second] * pairs
    return chance_EE + chance_EE.T


def _set_sums(weights_NE: Floats, most: int) -> Floats:
    """[N, most + 1] elementary symmetric polynomials of each row."""
    sums_NK = np.zeros((len(weights_NE), most + 1))
    sums_NK[:, 0] = 1
    for weight_N1 in weights_NE.T[:, :, None]:
        sums_NK[:, 1:] += weight_N1 * sums_NK[:, :-1]
    return sums_NK


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
