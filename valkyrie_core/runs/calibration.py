"""Calibrating a run, with all parts wired together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from valkyrie_core.data.packing import PackedSplit, chosen
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.errors import UsageError
from valkyrie_core.evaluate.calibrate import THRESHOLDS, highest, learn_then_test, rows_needed
from valkyrie_core.evaluate.rules import becomes_of_sure, full_depth, has_depths
from valkyrie_core.evaluate.thinking import Said, Thought, said_by, think
from valkyrie_core.inventory import RunPlace
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.halting import Confidence, ConfidenceConfig
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.report import CalibrateReport, CalibrationTest, TriedThreshold
from valkyrie_core.runs.calibrated import FILE, Calibrated, checkpoint_hash
from valkyrie_core.runs.texts import texts_of_training
from valkyrie_core.train.device import resolve_precision
from valkyrie_core.train.load import load_run
from valkyrie_core.train.storage import Storage

PASSES = 3
"""With the threshold and without, in turns; the fastest of each counts."""
DOCUMENT_TOKENS = 512
"""Of a text, at most: the rows are documents, so more of them say more than longer ones."""


class _Reader(NamedTuple):
    """Reads splits of all of a run's corpora, each in its own way."""

    model: Model
    asks: list[bool]
    """Of every corpus: whether it has questions; else it is text."""
    context_len: int
    precision: Precision

    def read(
        self, splits: Sequence[PackedSplit], threshold: float | None = None
    ) -> list[Thought | Said]:
        """What becomes of the splits where thought ends from a confidence on; None: never."""
        rule = None if threshold is None else ConfidenceConfig(threshold=threshold)
        return [
            self._read_one(split, rule, asks) for split, asks in zip(splits, self.asks, strict=True)
        ]

    def _read_one(
        self, split: PackedSplit, rule: ConfidenceConfig | None, asks: bool
    ) -> Thought | Said:
        model, length, precision = self.model, self.context_len, self.precision
        if isinstance(model, Canvas) or asks:
            return think(model, split, rule=rule, context_len=length, precision=precision)
        return said_by(model, split, rule=rule, context_len=length, precision=precision)

    def test(self, splits: Sequence[PackedSplit], threshold: float | None) -> CalibrationTest:
        """What a threshold saves and costs, beside full depth."""
        times: dict[bool, list[float]] = {False: [], True: []}
        pairs = {}
        for number in range(2 * PASSES):
            early = bool(number % 2)
            pairs[early] = self.read(splits, threshold if early else None)
            times[early].append(sum(one.seconds for one in pairs[early]))
        losses = _losses(pairs[False], pairs[True])
        return CalibrationTest(
            rows=min(map(len, losses)),
            risk=highest(losses),
            score=_share(pairs[True]),
            full_score=_share(pairs[False]),
            reasoning_steps=_mean_steps(pairs[True]),
            seconds=min(times[True]),
            full_seconds=min(times[False]),
        )


def calibrate_run(
    place: RunPlace,
    *,
    risk: float,
    delta: float,
    seed: int,
    save: bool,
    progress: Callable[[str, int, int], None] | None,
) -> CalibrateReport:
    """See `valkyrie_core.runs.calibrate`."""
    began = time.perf_counter()
    run = load_run(place.path)
    model, recipe = run.model, run.recipe
    _check_confidence(model)
    dataset = texts_of_training(run)
    precision = resolve_precision(recipe.train.precision, model.embedding.weight.device)
    asks = [isinstance(one, QuestionsCorpus) for one in recipe.data.corpora.values()]
    reader = _Reader(model, asks, recipe.train.longest_context, precision)
    held_out = [corpus.validation for corpus in dataset.corpora.values()]
    most = [None if questions else DOCUMENT_TOKENS for questions in asks]
    calibration, test = _halves(held_out, seed, most)
    full = reader.read(calibration)

    def losses_at(threshold: float) -> tuple[list[list[float]], float]:
        if progress is not None:
            progress("thresholds", THRESHOLDS.index(threshold) + 1, len(THRESHOLDS))
        early = reader.read(calibration, threshold)
        return _losses(full, early), _mean_steps(early)

    found = learn_then_test(THRESHOLDS, losses_at, risk=risk, delta=delta)
    report = CalibrateReport(
        run=place.name,
        step=run.checkpoint.step,
        risk=risk,
        delta=delta,
        unit="question" if all(asks) else "document",
        rows=min(map(len, _losses(full, full))),
        rows_needed=rows_needed(risk, delta),
        full_depth=full_depth(model),
        then=becomes_of_sure(model),
        threshold=found.threshold,
        tried=[
            TriedThreshold(
                threshold=one.threshold,
                risk=one.risk,
                p=one.p,
                reasoning_steps=one.steps,
                holds=one.p <= delta,
            )
            for one in found.tried
        ],
        test=reader.test(test, found.threshold),
        seconds=time.perf_counter() - began,
    )
    if save:
        threshold = found.threshold
        kept = Calibrated(
            checkpoint=checkpoint_hash(run.checkpoint),
            precision=precision,
            rule=None
            if threshold is None
            else ConfidenceConfig(threshold=threshold, then=becomes_of_sure(model)),
            risk=risk,
            delta=delta,
        )
        Storage().replace_json(place.path / FILE, kept.model_dump(mode="json"))
    return report


def _check_confidence(model: Model) -> None:
    """Raises UsageError where there is no learned confidence to calibrate."""
    if has_depths(model) and full_depth(model) == 1:
        raise UsageError(
            "the run thinks once: there is no thought that could end earlier",
            hint="train with more loops, or more steps of supervision",
        )
    looped = isinstance(model.core, Recursive) and isinstance(model.core.halting, Confidence)
    if isinstance(model, Canvas) or looped:
        return
    raise UsageError(
        "the run has learned no confidence that could be calibrated",
        hint="train with model.core.halting: {type: confidence}, or a canvas of several steps",
    )


def _halves(
    splits: Sequence[PackedSplit], seed: int, max_tokens: Sequence[int | None]
) -> tuple[list[PackedSplit], list[PackedSplit]]:
    """Half of every split's documents to choose by, and the other half to test on.

    Raises UsageError where a split has too few.
    """
    first, second = list[PackedSplit](), list[PackedSplit]()
    for number, (split, most) in enumerate(zip(splits, max_tokens, strict=True)):
        # not by turns: levels of difficulty take turns, too
        order = np.random.default_rng([seed, number]).permutation(split.num_documents)
        middle = (len(order) + 1) // 2
        if middle == len(order):
            raise UsageError("one held-out document can't be halved: hold out more")
        for half, documents in ((first, order[:middle]), (second, order[middle:])):
            half.append(chosen(split, sorted(documents.tolist()), max_tokens=most))
    return first, second


def _losses(full: Sequence[Thought | Said], early: Sequence[Thought | Said]) -> list[list[float]]:
    """Of every row of every corpus: 1 where ending early made a right answer wrong; of text, the
    share of its tokens that are others."""
    losses: list[list[float]] = []
    for before, after in zip(full, early, strict=True):
        if isinstance(before, Said) and isinstance(after, Said):
            losses.append(before.differs(after))
        elif isinstance(before, Thought) and isinstance(after, Thought):
            pairs = zip(before.right, after.right, strict=True)
            losses.append([float(was and not now) for was, now in pairs])
    if not all(losses):
        raise UsageError("a corpus scores nothing of its held-out documents: hold out more")
    return losses


def _mean_steps(found: Sequence[Thought | Said]) -> float:
    total = sum((one.steps for one in found[1:]), found[0].steps)
    return sum(depth * count for depth, count in total.items()) / total.total()


def _share(found: Sequence[Thought | Said]) -> float | None:
    right = [x for one in found if isinstance(one, Thought) for x in one.right]
    return sum(right) / len(right) if right else None
