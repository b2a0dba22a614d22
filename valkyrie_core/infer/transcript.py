"""A conversation on disk: JSON, bound to the model and the tokenizer that held it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from valkyrie_core.config import Config
from valkyrie_core.data.cache import write_synced
from valkyrie_core.data.tokenizer import NUM_RESERVED, Tokenizer
from valkyrie_core.errors import MissingError, ResourceError, UsageError
from valkyrie_core.nn.model import HybridLM

MAX_TRANSCRIPT_BYTES = 32 << 20


class Turn(Config):
    """One question and its answer."""

    user: str
    """What was asked."""
    assistant: str
    """What was answered, as text."""
    tokens: tuple[int, ...]
    """The tokens of the answer, markers not included: its text alone may split differently."""
    seed: int = Field(ge=0)
    """The seed of the draws; a retry takes the next one."""


class Transcript(Config):
    """A conversation on disk, bound to the model and tokenizer that held it."""

    schema_: Literal["valkyrie.transcript/1"] = Field(
        default="valkyrie.transcript/1", alias="schema"
    )
    """The version of this format."""
    model_fingerprint: str
    """A hash of the model's weights."""
    tokenizer_fingerprint: str
    """A hash of the tokenizer."""
    turns: tuple[Turn, ...]
    """The conversation, oldest first."""


def write_transcript(
    path: Path, turns: tuple[Turn, ...], model: HybridLM, tokenizer: Tokenizer
) -> None:
    """Writes a conversation, whole or not at all.

    Raises:
        ResourceError: it can't be written.
    """
    transcript = Transcript(
        model_fingerprint=model_fingerprint(model),
        tokenizer_fingerprint=tokenizer.fingerprint,
        turns=turns,
    )
    try:
        write_synced(path, transcript.model_dump_json(indent=1, by_alias=True).encode())
    except OSError as error:
        raise ResourceError(f"can't write {path}: {error.strerror or error}") from error


def read_transcript(path: Path, model: HybridLM, tokenizer: Tokenizer) -> tuple[Turn, ...]:
    """The turns of a saved conversation of this model and this tokenizer.

    Raises:
        MissingError: there is no such file, or it can't be read.
        UsageError: it is no transcript, it was changed, or another model wrote it.
    """
    transcript = _parse(path)
    if transcript.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UsageError(f"{path} was written with another tokenizer")
    if transcript.model_fingerprint != model_fingerprint(model):
        raise UsageError(
            f"{path} was written with other weights",
            hint="chat with the run and the checkpoint that it was saved from",
        )
    for number, turn in enumerate(transcript.turns, start=1):
        if any(not NUM_RESERVED <= token < tokenizer.vocab_size for token in turn.tokens):
            raise UsageError(f"{path}: answer {number} holds tokens that no answer can hold")
        if tokenizer.decode(turn.tokens) != turn.assistant:
            raise UsageError(
                f"{path}: the text of answer {number} is not that of its tokens",
                hint="a transcript can't be edited by hand",
            )
    return transcript.turns


def _parse(path: Path) -> Transcript:
    if not path.is_file():
        raise MissingError(f"there is no transcript {path}")
    if path.stat().st_size > MAX_TRANSCRIPT_BYTES:
        raise UsageError(f"{path} is too large for a transcript")
    try:
        return Transcript.model_validate_json(path.read_bytes())
    except OSError as error:
        raise MissingError(f"can't read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path} is no transcript: {where + ': ' if where else ''}{first['msg']}"
        ) from error


def model_fingerprint(model: HybridLM) -> str:
    """A hash over all weights."""
    return tensors_fingerprint(model.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash over the names, shapes, types and bits of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
