"""The score of a model on every validation corpus of a data set, baselines beside it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from valkyrie_core.data.cache import write_synced
from valkyrie_core.data.dataset import Dataset
from valkyrie_core.evaluate.baselines import Baselines, measure_baselines
from valkyrie_core.evaluate.bits import BitsPerByte, Context, bits_per_byte
from valkyrie_core.nn.models import Model

log = logging.getLogger("valkyrie")


class CorpusScore(BitsPerByte):
    """Bits per byte on one validation corpus."""

    baselines: Baselines | None = None
    """Simple predictors on the same text; None if they were not asked for."""


def score_corpora(
    model: Model,
    dataset: Dataset,
    *,
    context_len: int,
    batch_size: int = 8,
    context: Context = "carried",
    max_tokens: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    baselines: bool = True,
    cache_dir: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, CorpusScore]:
    """Scores the validation split of every corpus, in the recipe's order.

    Args:
        max_tokens: only the first so many tokens of each corpus.
        baselines: whether to measure them; they depend on the data alone and are kept in
            `cache_dir`.
        progress: called with the corpus, the positions read, and their total.
        stop: polled between chunks; the corpora after a stop are left out.

    Raises:
        DivergedError: a loss is not finite.
        StoppedError: stopped before anything was scored.
    """
    scores: dict[str, CorpusScore] = {}
    for name, corpus in dataset.corpora.items():
        if stop is not None and scores and stop():
            break
        bits = bits_per_byte(
            model,
            corpus.validation,
            context_len=context_len,
            batch_size=batch_size,
            context=context,
            max_tokens=max_tokens,
            precision=precision,
            progress=None if progress is None else _named(progress, name),
            stop=stop,
        )
        beside = corpus_baselines(dataset, name, cache_dir=cache_dir) if baselines else None
        scores[name] = CorpusScore(**bits.model_dump(), baselines=beside)
    return scores


def _named(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda read, total: progress(name, read, total)


def corpus_baselines(dataset: Dataset, name: str, *, cache_dir: Path | None = None) -> Baselines:
    """The baselines of one corpus: read from `cache_dir` if they were measured on the same data."""
    path = None
    if cache_dir is not None:
        key = hashlib.sha256(f"{dataset.fingerprint}/{name}".encode()).hexdigest()
        path = cache_dir / "baselines" / f"{key}.json"
        if path.exists():
            try:
                return Baselines.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                log.warning("measuring the baselines again: %s can't be read (%s)", path, error)
    corpus = dataset.corpora[name]
    log.info("measuring the baselines of %s (xz takes a second per MiB)", name)
    measured = measure_baselines(corpus.train, corpus.validation, dataset.tokenizer)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, measured.model_dump_json(indent=1).encode())
        except OSError as error:
            log.warning("the baselines are not kept: %s", error)
    return measured
