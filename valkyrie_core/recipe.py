"""A recipe: one YAML file that is one whole experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.data.dataset import DataConfig
from valkyrie_core.nn.model import HybridLMConfig
from valkyrie_core.train.config import SupervisedConfig


class Recipe(Config):
    """Everything that defines a run: data, model, training."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Names the run: its directory is runs_dir/name."""
    description: str = ""
    """One sentence on what the experiment is for."""
    seed: int = Field(default=0, ge=0)
    """Fixes initial weights, data order and sampling."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    runs_dir: str = "runs"
    """Where runs live, relative to the current folder."""
    data: DataConfig
    """What is learned from."""
    model: HybridLMConfig
    """What learns."""
    train: SupervisedConfig
    """How it learns."""

    @model_validator(mode="after")
    def _vocabulary_is_the_tokenizers(self) -> Recipe:
        size = self.data.tokenizer.vocab_size
        if self.model.vocab_size is None:
            model = self.model.model_copy(update={"vocab_size": size})
            object.__setattr__(self, "model", model)
        elif self.model.vocab_size != size:
            raise ValueError(
                f"model.vocab_size ({self.model.vocab_size}) is not the tokenizer's ({size}); "
                "leave it out"
            )
        return self
