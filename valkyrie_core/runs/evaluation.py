"""Evaluation, with all parts wired together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from valkyrie_core.cache import cache_dir
from valkyrie_core.data.dataset import Dataset
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import UsageError
from valkyrie_core.evaluate import corpora
from valkyrie_core.evaluate.answers import Answered, answered
from valkyrie_core.evaluate.bits import Context
from valkyrie_core.evaluate.episodic import asked_with_memory
from valkyrie_core.evaluate.rules import Rule, canvas_rule, full_depth, thinking_up_to
from valkyrie_core.inventory import RunPlace
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.weights import rounded
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import (
    Accuracy,
    CorpusScore,
    EvalReport,
    MemoryScore,
    ThinkingScore,
    Weights,
)
from valkyrie_core.runs.calibrated import Calibrated
from valkyrie_core.runs.halting import asked_rule, check_depths
from valkyrie_core.runs.talk import precision_of
from valkyrie_core.runs.texts import texts_of_training
from valkyrie_core.runs.thinking import thinking_of
from valkyrie_core.train.device import resolve_precision
from valkyrie_core.train.load import load_run

LEAST_FOR_XZ = 1024
"""Bytes of text; of less an .xz file is mostly its headers."""


class _Asking(NamedTuple):
    """How everything is asked of a model."""

    recipe: Recipe
    dataset: Dataset
    tokenizer: Tokenizer
    context: Context
    progress: Callable[[str, int, int], None] | None
    rule: Rule | None
    """What ends thought early; None: nothing."""
    calibrated: Calibrated | None
    """The promise, where the rule is that of it."""
    trained_depth: int
    memory: float | None
    """The cosine from which on a remembered answer is tried; None: there is no memory."""

    def scores(self, model: Model, precision: Precision) -> dict[str, corpora.CorpusScore]:
        """The likelihood of every corpus's held-out text."""
        return corpora.score_corpora(
            model,
            self.dataset,
            context_len=self.recipe.train.longest_context,
            context=self.context,
            precision=precision,
            cache_dir=cache_dir(),
            progress=self.progress,
        )

    def report(
        self, model: Model, name: str, score: corpora.CorpusScore, fp32_bpb: float | None
    ) -> CorpusScore:
        """All that is known of one corpus, whose likelihood was scored."""
        corpus = self.recipe.data.corpora[name]
        split = self.dataset.corpora[name].validation
        precision, context_len = score.precision, score.context_len
        accuracy = memory = None
        if isinstance(corpus, QuestionsCorpus):
            accuracy = _accuracy(
                answered(model, corpus, split, context_len=context_len, precision=precision)
            )
        thinking = thinking_of(
            model,
            split,
            questions=isinstance(corpus, QuestionsCorpus),
            context_len=context_len,
            precision=precision,
            rule=self.rule,
            calibrated=self.calibrated,
            trained_depth=self.trained_depth,
        )
        if self.memory is not None and isinstance(corpus, QuestionsCorpus):
            assert isinstance(model, Canvas)
            memory = _remembered(model, self.tokenizer, corpus, self.memory, self.rule, precision)
        return _report(score, fp32_bpb, accuracy, thinking, memory)


def evaluate_run(
    place: RunPlace,
    *,
    context: Context,
    weights: Weights,
    progress: Callable[[str, int, int], None] | None,
    halt: str | None = None,
    min_depth: int | None = None,
    max_depth: int | None = None,
    memory: float | None = None,
) -> EvalReport:
    """See `valkyrie_core.runs.evaluate`."""
    began = time.perf_counter()
    run = load_run(place.path)
    model, recipe = run.model, run.recipe
    dataset = texts_of_training(run)
    check_depths(model, halt, min_depth, max_depth)
    rule, calibrated = asked_rule(place, run, halt, min_depth)
    if memory is not None and not isinstance(model, Canvas):
        raise UsageError(
            "the memory of answers is a canvas's, and the run's model is none",
            hint="leave out --memory",
        )
    precision = resolve_precision(recipe.train.precision, model.embedding.weight.device)
    if weights != "fp32":
        # as `generate` and `chat` compute
        precision = precision_of(weights, model)
    kept = calibrated is not None and calibrated.precision == precision
    if weights != "fp32" or max_depth is not None or not kept:
        # the promise is about these weights as they were computed with, at full depth
        calibrated = None
    asking = _Asking(
        recipe,
        dataset,
        run.tokenizer,
        context,
        progress,
        rule,
        calibrated,
        trained_depth=full_depth(model),
        memory=memory,
    )
    # what the format costs is measured, so the weights as trained are scored first
    with thinking_up_to(model, max_depth):
        as_trained = None if weights == "fp32" else asking.scores(model, "fp32")
    used = rounded(model, weights, precision)
    with thinking_up_to(used, max_depth):
        scores = asking.scores(used, precision)
        found = {
            name: asking.report(used, name, score, as_trained[name].bpb if as_trained else None)
            for name, score in scores.items()
        }
    first = next(iter(scores.values()))
    return EvalReport(
        run=place.name,
        step=run.checkpoint.step,
        parameters=model.num_parameters(),
        context=first.context,
        context_len=first.context_len,
        precision=first.precision,
        weights=weights,
        seconds=time.perf_counter() - began,
        corpora=found,
    )


def _remembered(
    model: Canvas,
    tokenizer: Tokenizer,
    corpus: QuestionsCorpus,
    threshold: float,
    rule: Rule | None,
    precision: Precision,
) -> MemoryScore:
    found = asked_with_memory(
        model,
        tokenizer,
        corpus.task,
        corpus.held_out(),
        threshold=threshold,
        rule=None if rule is None else canvas_rule(model, rule),
        min_steps=1 if rule is None else rule.min_loops,
        precision=precision,
    )
    return MemoryScore(
        threshold=threshold,
        hits=found.hits,
        refused=found.refused,
        misses=found.misses,
        stored=found.stored,
        share=sum(found.right) / len(found.right),
        reasoning_steps=found.steps / len(found.right),
    )


def _accuracy(found: Answered) -> Accuracy:
    return Accuracy(
        share=sum(found.right) / len(found.right),
        questions=len(found.right),
        by_difficulty=found.by_level(),
        constant_answer=found.constant,
    )


def _report(
    score: corpora.CorpusScore,
    fp32_bpb: float | None,
    accuracy: Accuracy | None,
    thinking: ThinkingScore | None,
    memory: MemoryScore | None,
) -> CorpusScore:
    baselines: dict[str, float | None] = {}
    notes = []
    beside = score.baselines
    if beside is not None:
        baselines = {
            "uniform": beside.uniform,
            "unigram": beside.unigram,
            "xz": beside.xz.bpb,
            "xz_given_training": beside.xz_given_training.bpb,
        }
        if score.bytes < LEAST_FOR_XZ:
            baselines |= {"xz": None, "xz_given_training": None}
            notes.append(f"{score.bytes} bytes are too few for xz: its headers would be counted")
        xz = beside.xz_given_training
        if xz.training_bytes < xz.training_bytes_total:
            notes.append(f"xz read {xz.training_bytes} of {xz.training_bytes_total} training bytes")
        if xz.validation_bytes < xz.validation_bytes_total:
            notes.append(f"xz packed {xz.validation_bytes} of {xz.validation_bytes_total} bytes")
    return CorpusScore(
        bpb=score.bpb,
        tokens=score.tokens,
        bytes=score.bytes,
        documents=score.documents,
        baselines=baselines,
        fp32_bpb=fp32_bpb,
        weights_cost_bpb=None if fp32_bpb is None else score.bpb - fp32_bpb,
        accuracy=accuracy,
        thinking=thinking,
        memory=memory,
        notes=notes,
    )
