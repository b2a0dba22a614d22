"""A canvas that halts says what it would say alone, and computes nothing for who is done."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.nn.test_canvas import CELLS, canvas, questions
from valkyrie_core.nn.answering import Done, TokenRule, answers
from valkyrie_core.nn.canvas import HALT, Canvas
from valkyrie_core.nn.halting import KL, Argmax, ArgmaxConfig, KLConfig, Latent, LatentConfig


def model_of(**core: Any) -> Canvas:
    return canvas(pattern=["attn"], halt_max_steps=6, **core)


@functools.cache
def usual_q() -> float:
    """What half of the answers are more sure than, after the first step."""
    return float(next(iter(model_of().steps(questions(12)[0]))).q_BQ[:, HALT].median())


RULES: dict[str, TokenRule | Done] = {
    "latent": Latent(LatentConfig(threshold=0.4)),
    "kl": KL(KLConfig(threshold=0.05)),
    "argmax": Argmax(ArgmaxConfig(patience=2)),
    "confidence": lambda out: out.q_BQ[:, HALT] > usual_q(),
}


@pytest.mark.parametrize("name", RULES)
def test_together_as_alone(name: str) -> None:
    model, rule = model_of(), RULES[name]
    tokens_BC, targets_BC = questions(12)
    watched_BC = targets_BC != -100
    with torch.no_grad():
        together = answers(model, tokens_BC, rule, watched_BC=watched_BC)
        assert len(set(together.steps_B.tolist())) > 1, "a rule that treats all alike tests nothing"
        for row in range(12):
            one = slice(row, row + 1)
            alone = answers(model, tokens_BC[one], rule, watched_BC=watched_BC[one])
            assert int(alone.steps_B) == int(together.steps_B[row])
            torch.testing.assert_close(alone.logits_BCV[0], together.logits_BCV[row])
            torch.testing.assert_close(alone.q_B[0], together.q_B[row])


@pytest.mark.parametrize("name", RULES)
def test_it_says_what_stood_there_at_that_step(name: str) -> None:
    model = model_of()
    tokens_BC, _ = questions(8)
    with torch.no_grad():
        outs = list(model.steps(tokens_BC))
        found = answers(model, tokens_BC, RULES[name])
    for row, step in enumerate(found.steps_B.tolist()):
        torch.testing.assert_close(found.logits_BCV[row], outs[step - 1].logits_BCV[row])
        torch.testing.assert_close(found.q_B[row], outs[step - 1].q_BQ[row, HALT])


def test_who_is_done_is_not_computed() -> None:
    model = model_of()
    tokens_BC, _ = questions(12)
    rows = []
    model.core.register_forward_pre_hook(lambda _module, given: rows.append(len(given[0])))
    found = answers(model, tokens_BC, RULES["confidence"])
    expected = [int((found.steps_B >= step).sum()) for step in range(1, 7)]
    assert rows == [count for count in expected if count]
    assert rows[-1] < 12


def test_without_a_rule_all_steps_are_made() -> None:
    model = model_of()
    tokens_BC, _ = questions(3)
    *_, last = model.steps(tokens_BC)
    found = answers(model, tokens_BC)
    assert found.steps_B.tolist() == [6] * 3
    torch.testing.assert_close(found.logits_BCV, last.logits_BCV)
    assert answers(model, tokens_BC, max_steps=2).steps_B.tolist() == [2] * 3
    # a canvas may think longer than it was trained to
    assert answers(model, tokens_BC, max_steps=8).steps_B.tolist() == [8] * 3


def test_nothing_ends_before_its_least_steps() -> None:
    model = model_of()
    tokens_BC, _ = questions(6)
    always: Done = lambda out: torch.ones(len(out.q_BQ), dtype=torch.bool)  # noqa: E731
    assert answers(model, tokens_BC, always).steps_B.tolist() == [1] * 6
    assert answers(model, tokens_BC, always, min_steps=4).steps_B.tolist() == [4] * 6


def test_cells_that_are_not_watched_keep_nobody_thinking() -> None:
    model = model_of()
    tokens_BC, _ = questions(4)
    nothing_BC = torch.zeros(4, CELLS, dtype=torch.bool)
    found = answers(model, tokens_BC, RULES["kl"], watched_BC=nothing_BC)
    assert found.steps_B.tolist() == [1] * 4
