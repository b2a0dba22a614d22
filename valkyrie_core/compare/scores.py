"""What one trained model scores on every item, kept beside the comparison.

An item is the beginning of a document, so that a long one leaves room for others. Where a corpus
has few documents, an item is a stretch of one: stretches of one document resemble each other, and
an interval over them speaks of these documents alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from valkyrie_core.cache import cache_dir
from valkyrie_core.compare.statistics import Array
from valkyrie_core.config import Config
from valkyrie_core.data.dataset import prepare
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.errors import CheckpointError, ResourceError
from valkyrie_core.evaluate.answers import Answered, answered
from valkyrie_core.evaluate.bits import ItemScore, item_scores
from valkyrie_core.evaluate.rules import full_depth, own_rule
from valkyrie_core.evaluate.thinking import by_depth, think
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.models import Model
from valkyrie_core.train.checkpoint import step_directory
from valkyrie_core.train.load import load_run
from valkyrie_core.train.manifest import MANIFEST
from valkyrie_core.train.storage import Storage

FEW_DOCUMENTS = 10
"""Documents of a corpus below which items are stretches; else there is room for so many."""
STRETCH = 1024
"""Tokens of one."""


class CorpusItems(Config):
    """The items of one corpus, in its order."""

    stretches: bool
    """Whether items are stretches of documents."""
    documents: int
    """From which they are."""
    items: tuple[tuple[int, int, float, int], ...]
    """(document, stretch, nats, bytes) of each."""


class Answers(Config):
    """What became of a corpus's questions."""

    right: tuple[bool, ...]
    """Of every held-out question, in the corpus's order."""
    difficulty: tuple[int, ...]
    """Likewise."""
    constant: float
    """The share that one answer for all gets right."""


class Depths(Config):
    """What a model with loops or steps scores at each of them, and where its recipe's rule ends."""

    by_depth: tuple[float, ...]
    """The share of right answers where every question is thought about so long, from 1 on."""
    ended: tuple[float, ...]
    """The share of tokens, or of questions, that the rule ends there; empty without a rule."""
    early: float | None
    """The share of right answers with the rule."""


class RunScores(Config):
    """What a model scores."""

    checkpoint: str
    """Hash of what was scored: another checkpoint has another one."""
    text: str
    """Fingerprint of what it was scored on, and how."""
    tokens: int
    """Of each corpus, at most."""
    corpora: dict[str, CorpusItems]
    """By name, in the recipe's order."""
    answers: dict[str, Answers]
    """Of corpora of questions, by name."""
    depths: dict[str, Depths]
    """Likewise, of a model that has some."""


def scores_of(
    run: Path,
    step: int,
    tokens: int,
    kept: Path,
    *,
    text: str,
    context_len: int,
    precision: Precision,
    progress: Callable[[str, int, int], None] | None = None,
) -> RunScores:
    """The scores of a run's checkpoint; what `kept` holds is not computed again.

    Args:
        tokens: of each corpus, at most.
        text: the fingerprint of the text.
        context_len: tokens of a window.
        precision: in which all designs are scored.

    Raises:
        CheckpointError: the checkpoint can't be read.
        DivergedError: a loss is not finite.
        ResourceError: `kept` can't be written.
    """
    checkpoint = _identity(run, step)
    how = f"{text} {context_len} {precision} {STRETCH} {FEW_DOCUMENTS}"
    found = _read(kept)
    if found is not None and (found.checkpoint, found.text, found.tokens) == (
        checkpoint,
        how,
        tokens,
    ):
        return found
    loaded = load_run(run, step=step)
    recipe = loaded.recipe
    dataset = prepare(recipe.data, cache=cache_dir(), tokenizer=loaded.tokenizer)
    corpora = {
        name: _items(
            loaded.model, corpus.validation, tokens, context_len, precision, _named(progress, name)
        )
        for name, corpus in dataset.corpora.items()
    }
    answers = {
        name: _answers(
            answered(
                loaded.model,
                asked,
                dataset.corpora[name].validation,
                context_len=context_len,
                precision=precision,
            )
        )
        for name, asked in recipe.data.corpora.items()
        if isinstance(asked, QuestionsCorpus)
    }
    depths = {}
    if full_depth(loaded.model) > 1:
        depths = {
            name: _depths(loaded.model, dataset.corpora[name].validation, context_len, precision)
            for name in answers
        }
    scores = RunScores(
        checkpoint=checkpoint,
        text=how,
        tokens=tokens,
        corpora=corpora,
        answers=answers,
        depths=depths,
    )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        Storage().replace_json(kept, scores.model_dump(mode="json"))
    except OSError as error:
        raise ResourceError(f"{kept} can't be written: {error.strerror}") from error
    return scores


def _items(
    model: Model,
    split: PackedSplit,
    tokens: int,
    context_len: int,
    precision: Precision,
    progress: Callable[[int, int], None] | None,
) -> CorpusItems:
    """What every document's beginning costs, or every stretch where there are few documents."""
    few = len(split.doc_starts) - 1 < FEW_DOCUMENTS
    items = item_scores(
        model,
        split,
        context_len=context_len,
        context="window",
        max_tokens=tokens,
        of_document=None if few else max(2, tokens // FEW_DOCUMENTS),
        stretch=STRETCH if few else None,
        precision=precision,
        progress=progress,
    )
    return CorpusItems(
        stretches=few and any(one.stretch for one in items),
        documents=len({one.document for one in items}),
        items=tuple(tuple(one) for one in items),
    )


def _depths(model: Model, split: PackedSplit, context_len: int, precision: Precision) -> Depths:
    rule, full = own_rule(model), range(1, full_depth(model) + 1)
    shares = by_depth(model, split, full[-1], context_len=context_len, precision=precision)
    depths = tuple(shares.values())
    if rule is None:
        return Depths(by_depth=depths, ended=(), early=None)
    found = think(model, split, rule=rule, context_len=context_len, precision=precision)
    ended = tuple(found.steps[depth] / found.steps.total() for depth in full)
    return Depths(by_depth=depths, ended=ended, early=found.share)


def _answers(found: Answered) -> Answers:
    return Answers(
        right=tuple(found.right), difficulty=tuple(found.difficulty), constant=found.constant
    )


def _named(
    progress: Callable[[str, int, int], None] | None, name: str
) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda read, total: progress(name, read, total)


def _identity(run: Path, step: int) -> str:
    """Of a checkpoint: its manifest has the hash of every file."""
    path = step_directory(run / "checkpoints", step) / MANIFEST
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error


def _read(kept: Path) -> RunScores | None:
    try:
        return RunScores.model_validate_json(kept.read_bytes())
    except (OSError, ValidationError):
        return None


def bits_SI(runs: Sequence[RunScores], corpora: Sequence[str]) -> tuple[Array, Array]:
    """Bits per byte of every seed and item, and the items' bytes."""
    items_SI = [
        [ItemScore(*item) for name in corpora for item in run.corpora[name].items] for run in runs
    ]
    keys = {tuple((one.document, one.stretch, one.bytes) for one in items) for items in items_SI}
    if len(keys) > 1:
        raise ValueError("trainings were scored on different items")
    sizes = np.array([one.bytes for one in items_SI[0]], dtype=np.float64)
    nats_SI = np.array([[one.nats for one in items] for items in items_SI])
    return nats_SI / math.log(2) / sizes, sizes


def kinds_I(run: RunScores, corpora: Sequence[str]) -> npt.NDArray[np.int64]:
    """The corpus of every item that `bits_SI` has."""
    return np.repeat(
        np.arange(len(corpora)), [len(run.corpora[name].items) for name in corpora]
    ).astype(np.int64)


def levels_I(run: RunScores, corpora: Sequence[str]) -> npt.NDArray[np.int64]:
    """The corpus and the level, as one number, of every question that `right_SI` has."""
    pairs = [
        (number, level)
        for number, name in enumerate(corpora)
        for level in run.answers[name].difficulty
    ]
    return np.unique(np.array(pairs), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def right_SI(runs: Sequence[RunScores], corpora: Sequence[str]) -> Array:
    """1 where a seed's model answered a question, else 0."""
    return np.array(
        [[float(x) for name in corpora for x in run.answers[name].right] for run in runs]
    )
