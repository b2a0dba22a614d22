"""A tokenizer on disk: `tokenizer.json`, and `tokenizer.model` where there is one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from valkyrie_core.data.cache import raise_storage_error, write_synced
from valkyrie_core.data.documents import SPECIAL_TOKENS
from valkyrie_core.errors import CheckpointError, MissingError

SCHEMA = "valkyrie.tokenizer/1"
MAX_MODEL_BYTES = 64 << 20
_JSON = "tokenizer.json"
_MODEL = "tokenizer.model"


def save_tokenizer(directory: Path, *, kind: str, vocab_size: int, model: bytes | None) -> None:
    """Writes the model first, then the JSON that holds its hash; each whole or not at all."""
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "vocab_size": vocab_size,
        "special_tokens": list(SPECIAL_TOKENS),
        "model_sha256": hashlib.sha256(model).hexdigest() if model is not None else None,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if model is not None:
            write_synced(directory / _MODEL, model)
        write_synced(directory / _JSON, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise_storage_error(error, directory)


def read_tokenizer(directory: Path) -> tuple[str, bytes | None]:
    """The kind and the checked model bytes (None where the kind needs no model).

    Raises MissingError where a file is not there, CheckpointError where one is damaged.
    """
    path = directory / _JSON
    try:
        content = json.loads(path.read_bytes())
        schema, kind, sha256 = content["schema"], content["kind"], content["model_sha256"]
        specials = content["special_tokens"]
    except FileNotFoundError as error:
        raise MissingError(f"no tokenizer in {directory} ({_JSON} is not there)") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if schema != SCHEMA or specials != list(SPECIAL_TOKENS) or not isinstance(kind, str):
        raise CheckpointError(f"{path} is of another format ({schema!r}), not {SCHEMA!r}")
    if sha256 is None:
        return kind, None
    model = read_model(directory / _MODEL)
    if hashlib.sha256(model).hexdigest() != sha256:
        raise CheckpointError(f"{directory / _MODEL} is damaged: its hash is not that in {_JSON}")
    return kind, model


def read_model(path: Path) -> bytes:
    """The bytes of a SentencePiece model file, at most 64 MiB."""
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise CheckpointError(f"{path} is larger than 64 MiB: no tokenizer")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MissingError(
            f"{path}: no such tokenizer model", hint="build one: valkyrie tokenizer build RECIPE"
        ) from error
    except OSError as error:
        raise MissingError(f"{path}: can't be read ({error.strerror})") from error
