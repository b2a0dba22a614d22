"""Building a recipe's tokenizer, and what it does to text, as reports."""

from __future__ import annotations

from pathlib import Path

import torch

from valkyrie_core.data import tokenizer_report
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import TokenizerBuildReport, TokenizerEvalReport, TokenizerScore


def build(recipe: Recipe, directory: Path) -> TokenizerBuildReport:
    """See `valkyrie_core.runs.build_tokenizer`."""
    built = tokenizer_report.build(recipe.data, directory)
    return TokenizerBuildReport(
        directory=str(built.directory),
        kind=built.tokenizer.kind,
        vocab_size=built.tokenizer.vocab_size,
        fingerprint=built.tokenizer.fingerprint,
        documents=built.documents,
        seconds=built.seconds,
    )


def score(recipe: Recipe) -> TokenizerEvalReport:
    """See `valkyrie_core.runs.evaluate_tokenizer`."""
    found = tokenizer_report.evaluate(recipe.data)
    tokenizer = found.tokenizer
    cost = tokenizer_report.embedding_parameters(
        tokenizer.vocab_size, recipe.model.dim, recipe.model.head
    )
    with torch.device("meta"):
        total = HybridLM(recipe.model).num_parameters()
    return TokenizerEvalReport(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        corpora={
            name: TokenizerScore(
                documents=corpus.together.documents,
                bytes=corpus.together.bytes,
                tokens=corpus.together.tokens,
                bytes_per_token=corpus.together.bytes_per_token,
                train_bytes_per_token=corpus.train.bytes_per_token,
                validation_bytes_per_token=corpus.validation.bytes_per_token,
                round_trips=corpus.together.round_trips,
            )
            for name, corpus in found.corpora.items()
        },
        hostile=found.hostile,
        exact=found.exact,
        embedding_parameters=cost,
        parameters_share=cost / total,
    )
