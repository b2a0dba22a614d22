"""The corpus `questions`: a task's questions and answers, of which the answers alone are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.data.cache import fingerprint
from valkyrie_core.data.documents import Document, Drops, Piece
from valkyrie_core.data.formats import TextFormat
from valkyrie_core.data.tasks.brackets import BracketsConfig
from valkyrie_core.data.tasks.causal import CausalConfig
from valkyrie_core.data.tasks.expression import ExpressionConfig
from valkyrie_core.data.tasks.group import GroupConfig
from valkyrie_core.data.tasks.khop import KHopConfig
from valkyrie_core.data.tasks.kinship import KinshipConfig
from valkyrie_core.data.tasks.maze import MazeConfig
from valkyrie_core.data.tasks.path import PathConfig
from valkyrie_core.data.tasks.recall import RecallConfig
from valkyrie_core.data.tasks.scene import SceneConfig
from valkyrie_core.data.tasks.sequence import SequenceConfig
from valkyrie_core.data.tasks.sudoku import SudokuConfig
from valkyrie_core.data.tasks.task import Example, constant_answer, examples, is_held_out
from valkyrie_core.data.tasks.variables import VariablesConfig
from valkyrie_core.errors import RecipeError

VERSION = 3
"""Of the text that is made from a description."""
CONSTANT_EXAMPLES = 2000
"""Training questions that say which answer is the most frequent one."""

TaskConfig = Annotated[
    BracketsConfig
    | CausalConfig
    | ExpressionConfig
    | GroupConfig
    | KHopConfig
    | KinshipConfig
    | MazeConfig
    | PathConfig
    | RecallConfig
    | SceneConfig
    | SequenceConfig
    | SudokuConfig
    | VariablesConfig,
    Discriminator("type"),
]


class QuestionsHoldout(Config):
    """Holds out questions by a hash of what they ask: training never shows one of validation's."""

    type: Literal["questions"] = "questions"
    fraction: float = Field(default=0.1, gt=0, lt=1)
    """The share of all questions that validation alone asks."""


class QuestionsCorpus(Config):
    """Documents of one question and its answer, from a seed; levels of difficulty take turns."""

    type: Literal["questions"] = "questions"
    task: TaskConfig
    """What is asked."""
    validation_task: TaskConfig | None = None
    """What validation asks, where that is not what is trained on: other levels of the same task.
    Left out, it is the same."""
    examples: int = Field(default=20_000, ge=1)
    """Training questions."""
    validation_examples: int = Field(default=500, ge=1)
    """Held-out questions."""
    seed: int = Field(default=0, ge=0)
    """Another seed, other questions."""
    format: TextFormat = TextFormat()
    """Always text."""
    holdout: QuestionsHoldout = QuestionsHoldout()
    """Which questions are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""

    def digest(self, cache: Path) -> str:
        """A hash of the description: the text follows from it."""
        return fingerprint([VERSION, self.model_dump(mode="json", exclude={"weight"})])

    def read(self, cache: Path, drops: Drops) -> tuple[list[Document], list[Document]]:
        """Training and held-out questions. Raises RecipeError where a level has none."""
        fraction = self.holdout.fraction
        try:
            return (
                [_document("train", i, x, fraction) for i, x in enumerate(self.training())],
                [_document("validation", i, x, fraction) for i, x in enumerate(self.held_out())],
            )
        except ValueError as error:
            raise RecipeError(
                str(error), hint="another difficulty, or a larger task, has more questions"
            ) from None

    def training(self) -> list[Example]:
        """The questions that are trained on."""
        return self._examples(self.examples, held_out=False)

    def held_out(self) -> list[Example]:
        """The questions that validation asks, each once, in the order of its documents."""
        found: dict[tuple[str, str], Example] = {}
        for one in self._examples(self.validation_examples, held_out=True):
            found.setdefault((one.prompt, one.answer), one)
        return list(found.values())

    def constant_answer(self) -> float:
        """The share of held-out questions that one answer gets right: the most frequent one of
        the first training questions."""
        train = self._examples(min(self.examples, CONSTANT_EXAMPLES), held_out=False)
        return constant_answer(train, self.held_out())

    def _examples(self, count: int, *, held_out: bool) -> list[Example]:
        task = self.validation_task if held_out and self.validation_task else self.task
        fraction = self.holdout.fraction
        return list(examples(task, count, seed=self.seed, held_out=held_out, fraction=fraction))

    @model_validator(mode="after")
    def _validation_is_of_the_task(self) -> QuestionsCorpus:
        other = self.validation_task
        if other is None:
            return self
        mine, theirs = (one.model_dump(mode="json") for one in (self.task, other))
        # how often training asks about the same changes no question
        for key in {**mine, **theirs}.keys() - {other.level_key, "asked"}:
            if mine.get(key) != theirs.get(key):
                raise MisfitError(
                    f"{key} is {theirs.get(key)}, and of what is trained on {mine.get(key)} - "
                    f"only {self.task.level_key} may differ",
                    ("validation_task", key),
                )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_left_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # so that texts which were made before there was one are still the same
        content: dict[str, Any] = serialize(self)
        if self.validation_task is None:
            content.pop("validation_task", None)
        return content


def _document(split: str, index: int, example: Example, fraction: float) -> Document:
    name = f"{split}/{example.difficulty}/{index:06d}"
    labels = ""
    if split == "train":
        # what is a question of validation's is not asked on the way to a longer one
        labels = "".join(
            " " if is_held_out(example.prompt[: end + 1], fraction) else label
            for end, label in enumerate(example.labels)
        )
    # the end of the line ends the answer, and is scored with it
    pieces = [Piece(example.prompt, scored=False, labels=labels), Piece(example.answer + "\n")]
    if split == "train":
        for prompt, answer in example.more:
            pieces += [Piece(prompt, scored=False), Piece(answer + "\n")]
    return Document(name, tuple(pieces))
