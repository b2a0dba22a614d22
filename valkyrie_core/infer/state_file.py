"""A model's state on disk: what it has read, ready to go on from. Safetensors, no pickle.

A file is bound to the weights and the tokenizer that made it, and holds a hash of its own tensors:
a state of other weights, or a damaged one, would give fluent nonsense.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from valkyrie_core.data.cache import write_synced
from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import MissingError, ResourceError, UsageError
from valkyrie_core.infer.transcript import model_fingerprint, tensors_fingerprint
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import LMState
from valkyrie_core.nn.state_format import settle
from valkyrie_core.nn.state_tensors import MisfitStateError, state_from_tensors, state_tensors

SCHEMA = "valkyrie.state/1"
TOKENS = "tokens"
STATE = "state/"


class SavedState(NamedTuple):
    """What a model has read, and its state after it."""

    tokens: tuple[int, ...]
    state: LMState


def write_state(path: Path, saved: SavedState, model: HybridLM, tokenizer: Tokenizer) -> int:
    """Writes a state of one row, whole or not at all; returns the bytes of the file.

    Raises:
        ResourceError: it can't be written.
        UsageError: a file of another kind is there.
    """
    if path.exists() and not is_state_file(path):
        raise UsageError(f"{path} exists and is no state", hint="choose another name")
    state = settle(model, saved.state)
    tensors = {f"{STATE}{name}": t.cpu() for name, t in state_tensors(state).items()}
    tensors[TOKENS] = torch.tensor(saved.tokens, dtype=torch.int64)
    metadata = {
        "schema": SCHEMA,
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "content": tensors_fingerprint(tensors),
    }
    data = save(tensors, metadata)
    try:
        write_synced(path, data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"there is no folder {path.parent}") from error
    except OSError as error:
        raise ResourceError(f"can't write {path}: {error.strerror or error}") from error
    return len(data)


def read_state(path: Path, model: HybridLM, tokenizer: Tokenizer) -> SavedState:
    """The state that a file holds, for the model and tokenizer that made it.

    Raises:
        MissingError: there is no such file, or it can't be read.
        UsageError: it is no state, it is damaged, or another model wrote it.
    """
    if not path.is_file():
        raise MissingError(f"there is no state {path}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingError(f"can't read {path}: {error.strerror or error}") from error
    metadata = _metadata(data)
    if metadata.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no state that valkyrie wrote")
    if metadata.get("tokenizer_fingerprint") != tokenizer.fingerprint:
        raise UsageError(f"{path} was written with another tokenizer")
    if metadata.get("model_fingerprint") != model_fingerprint(model):
        raise UsageError(
            f"{path} was written with other weights",
            hint="it belongs to the run, and to the step of its training, that it was saved at; "
            "`valkyrie read` makes one for these weights",
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if metadata.get("content") != tensors_fingerprint(tensors) or TOKENS not in tensors:
        raise UsageError(f"{path} is damaged: its content is not what was written")
    ids = tensors.pop(TOKENS)
    if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) == 0:
        raise UsageError(f"{path} is damaged: it does not say what was read")
    if int(ids.min()) < 0 or int(ids.max()) >= tokenizer.vocab_size:
        raise UsageError(f"{path} is damaged: it has read tokens that there are not")
    own = {name.removeprefix(STATE): tensor for name, tensor in tensors.items()}
    try:
        state = state_from_tensors(model.init_state(1), own)
    except MisfitStateError as error:
        raise UsageError(f"{path} does not fit this model: {error}") from error
    broken = [name for name, t in own.items() if not bool(torch.isfinite(t).all())]
    if broken or not 0 <= int(state.pos_B[0]) <= len(ids):
        raise UsageError(f"{path} is damaged: its numbers are no state")
    return SavedState(tuple(ids.tolist()), state)


def is_state_file(path: Path) -> bool:
    """Whether `write_state` wrote this file."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            return _metadata(head + file.read(min(size, 1 << 24))).get("schema") == SCHEMA
    except OSError:
        return False


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata at the head of a safetensors file; empty where there is none."""
    # the library tells it for files only, and a file may change between two readings
    if len(data) < 8:
        return {}
    size = struct.unpack("<Q", data[:8])[0]
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
