"""A recipe: one YAML file that is one whole experiment."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.data.dataset import DataConfig
from valkyrie_core.data.tasks.khop import KHopConfig
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.canvas_core import CanvasConfig
from valkyrie_core.nn.recursive import RecursiveConfig
from valkyrie_core.recipe_explain import explain
from valkyrie_core.recipe_files import find_recipe, read_recipe_bytes
from valkyrie_core.recipe_overrides import Overrides, apply_overrides
from valkyrie_core.recipe_source import Source, fail
from valkyrie_core.recipe_yaml import read_yaml
from valkyrie_core.train.config import SupervisedConfig


class Recipe(Config):
    """Everything that defines a run: data, model, training."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Names the run: its directory is runs_dir/name."""
    description: str = ""
    """One sentence on what the experiment is for."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Fixes initial weights, data order and sampling."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    runs_dir: str = "runs"
    """Where runs live, relative to the current folder."""
    data: DataConfig
    """What is learned from."""
    model: ModelConfig
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
            raise MisfitError(
                f"{self.model.vocab_size} is not the tokenizer's size ({size}) - leave it out",
                ("model", "vocab_size"),
            )
        return self

    @model_validator(mode="after")
    def _memory_is_the_models(self) -> Recipe:
        core = self.model.core
        size = core.memory_tokens if isinstance(core, RecursiveConfig) else 0
        if "memory_tokens" not in self.data.model_fields_set:
            data = self.data.model_copy(update={"memory_tokens": size})
            object.__setattr__(self, "data", data)
        elif self.data.memory_tokens != size:
            raise MisfitError(
                f"{self.data.memory_tokens} is not the model's ({size}) - leave it out",
                ("data", "memory_tokens"),
            )
        if size >= self.train.context_len:
            raise MisfitError(
                f"{size} memory tokens leave no room for text in contexts of "
                f"{self.train.context_len}",
                ("model", "core", "memory_tokens"),
            )
        return self

    @model_validator(mode="after")
    def _canvas_is_read_whole(self) -> Recipe:
        core, train = self.model.core, self.train
        if not isinstance(core, CanvasConfig):
            return self
        if "context_len" not in train.model_fields_set:
            object.__setattr__(self, "train", train.model_copy(update={"context_len": core.cells}))
        elif train.context_len != core.cells:
            raise MisfitError(
                f"{train.context_len} is not the canvas's {core.cells} cells - leave it out",
                ("train", "context_len"),
            )
        for key in ("context_schedule", "state_passing", "compile", "fit"):
            if getattr(train, key):
                raise MisfitError("a canvas knows no such thing - leave it out", ("train", key))
        for name, corpus in self.data.corpora.items():
            if corpus.type != "questions":
                raise MisfitError(
                    "a canvas answers questions alone: corpora of the type questions",
                    ("data", "corpora", name),
                )
            if isinstance(corpus.task, KHopConfig) and corpus.task.asked > 1:
                raise MisfitError(
                    "a canvas answers one question at a time: leave it out",
                    ("data", "corpora", name, "task", "asked"),
                )
        return self

    @model_validator(mode="after")
    def _compiled_shapes_stay(self) -> Recipe:
        mixers = [mixer.type for _, mixer in self.model.mixers()]
        train = self.train
        own = [block.mixer.type for block in self.model.core.blocks.values()]
        if train.compile is not None and "routed" in own:
            raise MisfitError(
                "routers choose other tokens at every step, and each number of them would be "
                "compiled anew - leave it out",
                ("train", "compile"),
            )
        if train.compile is not None and train.state_passing is not None and "attention" in mixers:
            raise MisfitError(
                "attention carries more keys at every step with train.state_passing: each number "
                "of them would be compiled anew - leave one of the two out",
                ("train", "compile"),
            )
        return self

    @classmethod
    def load(cls, path_or_name: str | Path, overrides: Overrides = ()) -> Recipe:
        """Reads a recipe: a path or a bare name, and `--set` overrides such as `train.steps=10`.

        Raises RecipeError with one located line per mistake, MissingError if there is no such file.
        """
        return resolve(path_or_name, overrides).recipe

    @classmethod
    def from_json(cls, path: str | Path) -> Recipe:
        """Reads what `save` wrote. Raises RecipeError or MissingError."""
        return resolve(Path(path)).recipe

    def to_json(self) -> str:
        """The resolved recipe: every key with its value. It is a recipe file by itself."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the resolved recipe as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the resolved recipe; layout and comments don't count."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class Resolved(NamedTuple):
    """A recipe, and the text it came from."""

    recipe: Recipe
    source: Source


def resolve(path_or_name: str | Path, overrides: Overrides = ()) -> Resolved:
    """Reads, overrides and validates a recipe. Raises RecipeError or MissingError."""
    path = find_recipe(path_or_name)
    return resolve_bytes(read_recipe_bytes(path), str(path), overrides)


def resolve_bytes(data: bytes, name: str, overrides: Overrides = ()) -> Resolved:
    """The recipe in a file's content; `name` is the file in error messages. Raises RecipeError."""
    source = read_yaml(data, name)
    apply_overrides(source, overrides, Recipe)
    return validate(source)


def validate(source: Source) -> Resolved:
    """The recipe that a source holds. Raises RecipeError."""
    problems = list(source.problems)
    recipe = None
    try:
        # strict JSON: text is no number, but a list is what a tuple is written as
        recipe = Recipe.model_validate_json(json.dumps(source.tree), strict=True)
    except ValidationError as error:
        problems += explain(error, source, Recipe)
    if recipe is None or problems:
        raise fail(problems)
    return Resolved(recipe, source)
