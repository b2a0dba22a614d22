"""From scores to sentences, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from valkyrie_core.compare.curves import Curve, at_equal_spending
from valkyrie_core.compare.scores import CorpusItems, RunScores, bits_SI
from valkyrie_core.compare.sentences import sentence
from valkyrie_core.compare.verdict import metrics


def scores(bits: dict[str, list[float]], sizes: list[int]) -> RunScores:
    """One run's bits per byte, by corpus and item."""
    return RunScores(
        checkpoint="x",
        text="x",
        tokens=1000,
        answers={},
        depths={},
        corpora={
            name: CorpusItems(
                stretches=False,
                documents=len(values),
                items=tuple(
                    (i, 0, value * size * math.log(2), size)
                    for i, (value, size) in enumerate(zip(values, sizes, strict=True))
                ),
            )
            for name, values in bits.items()
        },
    )


def runs(gap: float, seeds: int = 3, noise: float = 0.01) -> list[RunScores]:
    rng = np.random.default_rng(round(1000 * gap) + 1007)
    sizes = list(range(100, 120))
    return [
        scores(
            {
                name: [2 + level + gap + noise * rng.normal() for _ in sizes]
                for name, level in (("plays", 0.0), ("code", 0.5))
            },
            sizes,
        )
        for _ in range(seeds)
    ]


def test_bits_are_over_bytes() -> None:
    found_SI, bytes_I = bits_SI([scores({"plays": [2.0, 3.0]}, [10, 30])], ["plays"])
    assert found_SI.tolist() == [[pytest.approx(2), pytest.approx(3)]]
    assert bytes_I.tolist() == [10, 30]


def test_a_clear_difference() -> None:
    found = metrics({"a": runs(0.0), "b": runs(-0.1)})
    assert [one.name for one in found] == [
        "bits per byte",
        "bits per byte: plays",
        "bits per byte: code",
    ]
    first = found[0]
    assert (first.contender, first.outcome, first.items, first.seeds) == ("b", "better", 40, 3)
    assert first.difference.value == pytest.approx(-0.1, abs=0.01)
    assert first.reference_mean == pytest.approx(2.25, abs=0.01)
    assert first.difference.p is not None
    assert first.difference.p_holm is not None
    # what the verdict is about is tested by itself, the corpora share one chance to err
    assert first.difference.p == first.difference.p_holm < 0.05
    for one in found[1:]:
        assert one.difference.p is not None
        assert one.difference.p_holm is not None
        assert one.difference.p <= one.difference.p_holm
    assert any(one.difference.p != one.difference.p_holm for one in found[1:])
    told = sentence("a", found, "flops")
    assert told.startswith("b is better than a at equal training FLOPs: -0.")
    assert "3 seeds, 40 items" in told
    assert "b is worse" in sentence("a", metrics({"a": runs(0), "b": runs(0.1)}), "tokens")


def test_no_difference_says_how_large_one_would_have_been_found() -> None:
    found = metrics({"a": runs(0.0, noise=0.5), "b": runs(0.001, noise=0.5)})
    assert {one.outcome for one in found} == {"not enough evidence"}
    told = sentence("a", found, "tokens")
    assert told.startswith("No difference was found between b and a at equal tokens")
    assert "would have been found four times in five" in told


def test_one_seed_and_equal_bits() -> None:
    told = sentence("a", metrics({"a": runs(0.0, 1), "b": runs(-0.1, 1)}), "seconds")
    assert told.startswith("Not enough evidence on b against a at equal seconds: one seed")
    same = runs(0.0)
    found = metrics({"a": same, "b": same})
    assert {one.outcome for one in found} == {"not enough evidence"}
    assert "equal to the last bit" in sentence("a", found, "params")


def test_every_contender_has_a_sentence() -> None:
    found = metrics({"a": runs(0.0), "b": runs(-0.1), "c": runs(0.2)})
    assert [one.contender for one in found] == ["b", "c"] * 3
    told = sentence("a", found, "tokens")
    assert "b is better" in told
    assert "c is worse" in told


def test_curves_are_read_at_equal_spending() -> None:
    def curve(*bits: float) -> Curve:
        return Curve(np.arange(1.0, len(bits) + 1) * 10, np.array(bits))

    curves = {"a": [curve(4, 3, 2), curve(4, 3, 2)], "b": [curve(5, 1), curve(5, 2)]}
    # b spent 20 steps of 3, a 30 of 1: at 30, b is at step 10
    assert at_equal_spending(curves, {"a": 1.0, "b": 3.0}) == {"b": 5 - 2}
    # at 15 of a's steps: 3.5
    assert at_equal_spending(curves, {"a": 2.0, "b": 1.5}) == {"b": pytest.approx(1.5 - 3.5)}
    # and where a curve does not reach back so far nothing is said
    assert at_equal_spending(curves, {"a": 1.0, "b": 30.0}) == {"b": None}
    assert at_equal_spending({"a": [], "b": curves["b"]}, {"a": 1.0, "b": 1.0}) == {"b": None}


def test_items_that_differ_are_never_paired() -> None:
    one, other = scores({"plays": [2.0, 3.0]}, [10, 30]), scores({"plays": [2.0, 3.0]}, [10, 31])
    with pytest.raises(ValueError, match="different items"):
        bits_SI([one, other], ["plays"])
