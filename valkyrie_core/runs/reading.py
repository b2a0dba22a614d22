"""Reading a text once and keeping the state after it, with all parts wired together."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from valkyrie_core.data.documents import clean_text
from valkyrie_core.data.tokenizer import opening
from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.evaluate.long_context import Told
from valkyrie_core.evaluate.long_text import read_utf8
from valkyrie_core.infer.engine import Engine
from valkyrie_core.infer.state_file import SavedState, is_state_file, read_state, write_state
from valkyrie_core.inventory import RunPlace
from valkyrie_core.nn.state_format import kept_bytes, settle
from valkyrie_core.report import ReadReport, Weights
from valkyrie_core.runs.talk import precision_of
from valkyrie_core.train.load import load_language_model


def read_text(
    place: RunPlace,
    text: Path,
    save_state: Path,
    *,
    state: Path | None,
    weights: Weights,
    chunk: int,
    told: Told | None,
) -> ReadReport:
    """See `valkyrie_core.runs.read`."""
    if chunk < 1:
        raise UsageError(f"a chunk has at least 1 token, not {chunk}")
    # what would fail after a long reading fails before it
    content = clean_text(read_utf8(text))
    if not save_state.parent.is_dir():
        raise MissingError(f"there is no folder {save_state.parent}")
    if save_state.exists() and not is_state_file(save_state):
        raise UsageError(f"{save_state} exists and is no state", hint="choose another name")
    model, tokenizer, _, checkpoint = load_language_model(place.path)
    engine = Engine(model, weights=weights, precision=precision_of(weights, model), chunk_len=chunk)
    ids = tokenizer.encode(content)
    if not ids:
        raise UsageError(f"{text} holds no text")
    before = SavedState((), model.init_state(1))
    if state is None:
        ids = [*opening(tokenizer, model.memory_tokens), *ids]
    else:
        before = read_state(state, model, tokenizer)
    began, after = time.perf_counter(), before.state
    for start in range(0, len(ids), chunk):
        window = ids[start : start + chunk]
        known = engine.prefill(torch.tensor([window]), after)
        assert known is not None
        after = known.state
        if told is not None:
            told(str(text), start + len(window), len(ids))
    seconds = time.perf_counter() - began
    saved = SavedState((*before.tokens, *ids), after)
    size = write_state(save_state, saved, model, tokenizer)
    return ReadReport(
        run=place.name,
        step=checkpoint.step,
        text=str(text),
        tokens=len(ids),
        total_tokens=len(saved.tokens),
        seconds=seconds,
        tokens_per_second=len(ids) / seconds,
        state_bytes=kept_bytes(settle(model, after)),
        file=str(save_state),
        file_bytes=size,
        weights=weights,
    )
