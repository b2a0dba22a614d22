"""A recipe and budgets so small that a search takes seconds."""

from __future__ import annotations

from pathlib import Path

from tests.train import small
from valkyrie_core.allocate.proxy import LanguageProxy, ProxyConfig, RecallProxy
from valkyrie_core.allocate.search import Rung, SearchConfig
from valkyrie_core.data.tasks.mqar import MQARConfig
from valkyrie_core.recipe import Recipe

PROXY = ProxyConfig(
    language=LanguageProxy(width=16, context_len=16, batch_size=2, steps=2, eval_tokens=64),
    recall=RecallProxy(
        width=16,
        batch_size=2,
        steps=2,
        test_problems=2,
        mqar=MQARConfig(vocab_size=16, length=12, pairs=(1, 3)),
    ),
)
SEARCH = SearchConfig(proxy=PROXY, rungs=(Rung(share=0.5, seeds=1), Rung(share=1.0, seeds=2)))


def tiny(folder: Path) -> Recipe:
    """A hybrid of two layers on a dozen small texts."""
    return small.recipe(folder)
