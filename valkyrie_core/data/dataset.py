"""From corpora to packed, memory-mapped tokens."""

from __future__ import annotations

from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.corpus import Corpus
from valkyrie_core.data.tokenizer import SentencePieceConfig, TokenizerConfig


class DataConfig(Config):
    """The text of an experiment: a weighted mixture of corpora and one tokenizer."""

    corpora: dict[str, Corpus] = Field(min_length=1)
    """Named corpora; the names appear in reports."""
    tokenizer: TokenizerConfig = SentencePieceConfig()
    """How text becomes tokens."""
