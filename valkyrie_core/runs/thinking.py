"""How much thought a run's answers take, for `valkyrie eval`."""

from __future__ import annotations

import functools

from valkyrie_core.data.packing import PackedSplit, chosen
from valkyrie_core.evaluate.bits import bits_per_byte
from valkyrie_core.evaluate.confidence import calibration_error, confidences
from valkyrie_core.evaluate.rules import Rule, becomes_of_sure, full_depth, looping
from valkyrie_core.evaluate.thinking import by_depth, think
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.models import Model
from valkyrie_core.report import HaltingScore, ThinkingScore
from valkyrie_core.runs.calibrated import Calibrated

PASSES = 3
"""With a rule and without, in turns; the fastest of each counts."""
TIMED = 256
"""Questions, or beginnings of documents, that a pass reads."""
TEXT_TOKENS = 32_768
"""Of a text that is read at every depth."""


def thinking_of(
    model: Model,
    split: PackedSplit,
    *,
    questions: bool,
    context_len: int,
    precision: Precision,
    rule: Rule | None,
    calibrated: Calibrated | None,
    trained_depth: int,
) -> ThinkingScore | None:
    """None for a model that thinks once.

    Args:
        questions: whether answers are scored; else text.
        rule: what ends thought early; None: nothing.
        calibrated: the promise, where the rule is that of it.
        trained_depth: loops or steps as in training; the model's own are all that are asked.
    """
    full = full_depth(model)
    if full == 1:
        return None

    def bits(depth: int, own: Rule | None = None) -> float:
        assert not isinstance(model, Canvas)
        with looping(model, own, depth):
            return bits_per_byte(
                model,
                split,
                context_len=context_len,
                context="window",
                max_tokens=TEXT_TOKENS,
                precision=precision,
            ).bpb

    if questions:
        depths = by_depth(model, split, full, context_len=context_len, precision=precision)
    else:
        depths = {depth: bits(depth) for depth in range(1, full + 1)}
    # of a text the beginning; questions are asked whole
    said = confidences(
        model,
        split,
        context_len=context_len,
        max_tokens=None if questions else TEXT_TOKENS,
        precision=precision,
    )
    halting = None
    if rule is not None:
        halting = halting_of(
            model,
            split,
            rule,
            depth=full,
            score=None if questions else bits(full, rule),
            full_score=depths[full],
            context_len=context_len,
            precision=precision,
            calibrated=calibrated,
        )
    held = None if said is None else said.held.double()
    return ThinkingScore(
        unit="steps of a question" if isinstance(model, Canvas) else "loops of a token",
        measure="right answers" if questions else "bits per byte",
        full_depth=trained_depth,
        by_depth=depths,
        calibration_error=None if said is None else calibration_error(said.said, said.held),
        brier=None if said is None or held is None else float(((said.said - held) ** 2).mean()),
        q_halt_mean=None if said is None else float(said.said.mean()),
        q_continue_mean=None
        if said is None or said.going_on is None
        else float(said.going_on.mean()),
        halting=halting,
    )


def halting_of(
    model: Model,
    split: PackedSplit,
    rule: Rule,
    *,
    depth: int,
    score: float | None,
    full_score: float,
    context_len: int,
    precision: Precision = "fp32",
    calibrated: Calibrated | None = None,
) -> HaltingScore:
    """What a rule saves, and what it costs.

    Args:
        depth: loops or steps at most.
        score: with the rule; None: the share of right answers, which is found here.
        full_score: the same without the rule.
    """
    ask = functools.partial(think, model, depth=depth, context_len=context_len, precision=precision)
    found = ask(split, rule=rule, max_tokens=None if score is None else TEXT_TOKENS)
    count = min(TIMED, split.num_documents)
    # a question is asked whole; of a text its beginning
    most = None if score is None else TEXT_TOKENS // count
    timed = chosen(split, range(count), max_tokens=most)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(PASSES):
        times[False].append(ask(timed).seconds)
        times[True].append(ask(timed, rule=rule).seconds)
    total = found.steps.total()
    shares = {one: found.steps[one] / total for one in range(1, depth + 1)}
    return HaltingScore(
        rule=_named(rule),
        then=becomes_of_sure(model, rule),
        calibrated_risk=calibrated.risk if calibrated else None,
        score=found.share if score is None else score,
        full_score=full_score,
        reasoning_steps=found.mean_steps,
        halt_rate=1 - shares[depth],
        steps=shares,
        seconds=min(times[True]),
        full_seconds=min(times[False]),
    )


def _named(rule: Rule) -> str:
    """As `--halt` takes it."""
    value = getattr(rule, "threshold", getattr(rule, "patience", None))
    return rule.type if value is None else f"{rule.type}={value:.4g}"
