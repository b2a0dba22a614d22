"""Answers of a canvas that halts: questions that are done are no longer computed.

Shapes: B questions, A those that are not done, C cells, M the memory and the cells, R watched
cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.nn.canvas import HALT, Canvas, CanvasOutput
from valkyrie_core.nn.canvas_core import Carry
from valkyrie_core.nn.halting import KL, Argmax, Latent, Thought

TokenRule = Latent | KL | Argmax
Done = Callable[[CanvasOutput], Tensor]
"""Which questions [A] are done after a step, by what the step gives."""


def rows_of(out: CanvasOutput, rows_A: Tensor) -> CanvasOutput:
    """What a step gave for some of its questions."""
    carry = Carry(*(z_BMD[rows_A] for z_BMD in out.carry))
    return CanvasOutput(out.logits_BCV[rows_A], out.q_BQ[rows_A], carry, out.told)


class Answers(NamedTuple):
    """What a canvas says."""

    logits_BCV: Tensor
    """Of each question after its last step."""
    steps_B: Tensor
    q_B: Tensor
    """The q-head's logit, after the last step, that the answer is right."""


def answers(
    model: Canvas,
    tokens_BC: Tensor,
    rule: TokenRule | Done | None = None,
    *,
    watched_BC: Tensor | None = None,
    min_steps: int = 1,
    max_steps: int | None = None,
    first: CanvasOutput | None = None,
) -> Answers:
    """Thinks about every question until it is done.

    Args:
        rule: a rule for tokens ends a question once it holds at all of its watched cells; None:
            all steps.
        watched_BC: the cells where the answer stands; None: all.
        min_steps: nothing is done before.
        max_steps: everything is done then; None: as in training.
        first: what the first step gave, where it has been made.
    """
    B, C = tokens_BC.shape
    last = max_steps or model.max_steps
    active_A = torch.arange(B, device=tokens_BC.device)
    carry = model.begin(B)
    memory: tuple[Tensor, ...] = ()
    if watched_BC is None:
        watched_BC = torch.ones_like(tokens_BC, dtype=torch.bool)
    if isinstance(rule, TokenRule):
        memory = rule.begin(B * C, carry.z_H_BMD)
    found: Answers | None = None
    for step in range(1, last + 1):
        before_AMD = carry.z_H_BMD
        out = first if step == 1 and first is not None else model(tokens_BC[active_A], carry)
        carry = out.carry
        if found is None:
            steps_B = torch.zeros(B, dtype=torch.int64, device=tokens_BC.device)
            found = Answers(out.logits_BCV.clone(), steps_B, out.q_BQ[:, HALT].clone())
        found.logits_BCV[active_A] = out.logits_BCV
        found.steps_B[active_A] = step
        found.q_B[active_A] = out.q_BQ[:, HALT]
        if rule is None or step == last:
            continue
        if isinstance(rule, TokenRule):
            done_A, memory = _all_done(
                model, rule, before_AMD, carry.z_H_BMD, active_A, watched_BC, memory
            )
        else:
            done_A = rule(out)
        if step < min_steps:
            continue
        active_A, carry = active_A[~done_A], Carry(*(z[~done_A] for z in carry))
        if not len(active_A):
            break
    assert found is not None
    return found


def _all_done(
    model: Canvas,
    rule: TokenRule,
    before_AMD: Tensor,
    after_AMD: Tensor,
    active_A: Tensor,
    watched_BC: Tensor,
    memory: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Questions whose every watched cell is done, and what the rule keeps of all cells."""
    C = watched_BC.shape[1]
    M = len(model.memory_MD)
    watched_AC = watched_BC[active_A]
    places_R = (active_A[:, None] * C + torch.arange(C, device=active_A.device))[watched_AC]

    def readout(h_RD: Tensor) -> Tensor:
        logits_RV: Tensor = model.head(model.head_norm(h_RD))
        return logits_RV

    thought = Thought(before_AMD[:, M:][watched_AC], after_AMD[:, M:][watched_AC], readout)
    done_R, kept = rule(thought, tuple(one[places_R] for one in memory))
    memory = tuple(one.index_copy(0, places_R, new) for one, new in zip(memory, kept, strict=True))
    done_AC = torch.ones_like(watched_AC)
    done_AC[watched_AC] = done_R
    return done_AC.all(1), memory
