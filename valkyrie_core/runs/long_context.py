"""Reading a long text with a run, with all parts wired together."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from valkyrie_core.data.cache import cache_dir, write_synced
from valkyrie_core.data.dataset import prepare
from valkyrie_core.data.packing import token_lengths
from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import ResourceError, UsageError
from valkyrie_core.evaluate import long_context as reading
from valkyrie_core.evaluate.long_figure import draw_long_context
from valkyrie_core.evaluate.long_page import long_page
from valkyrie_core.evaluate.long_text import choose, read_file
from valkyrie_core.evaluate.recall import measure_recall, summarise
from valkyrie_core.evaluate.recall_cases import cached_cases
from valkyrie_core.infer.engine import Engine
from valkyrie_core.inventory import RunPlace
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.position import RopeConfig
from valkyrie_core.nn.rwkv import RWKV7
from valkyrie_core.nn.state_format import (
    StateFormat,
    attention_layers,
    limit_windows,
    stretch_positions,
)
from valkyrie_core.report import (
    ContextScore,
    EffectiveContext,
    LengthCost,
    LongContextReport,
    LongReading,
    PositionScore,
    RecallScore,
    Weights,
)
from valkyrie_core.runs.talk import precision_of
from valkyrie_core.runs.training import tell_now_and_then
from valkyrie_core.train.device import resolve_precision
from valkyrie_core.train.load import load_language_model
from valkyrie_core.train.stages import trained_context

PICTURE, REPORT, PAGE = "long_context.png", "long_context.json", "long_context.md"
CHUNK, ROUNDED_CHUNK = 1024, 128
"""Tokens that are read at once, if nobody says; fewer where the state is rounded in between."""


def read_long(
    place: RunPlace,
    context: int,
    *,
    chunk: int | None,
    text: Path | None,
    weights: Weights,
    kept: StateFormat,
    yarn: float | None,
    recall: bool,
    save: bool,
    page: bool,
    told: reading.Told | None,
) -> LongContextReport:
    """See `valkyrie_core.runs.evaluate_long_context`."""
    if context < reading.SHORTEST:
        raise UsageError(f"a long context has at least {reading.SHORTEST} tokens, not {context}")
    if chunk is None:
        # what is kept between two chunks is rounded: fewer tokens between meet what is not
        chunk = ROUNDED_CHUNK if kept.rounds else CHUNK
    if chunk < 1:
        raise UsageError(f"a chunk has at least 1 token, not {chunk}")
    chunk = min(chunk, context)
    began = time.perf_counter()
    model, tokenizer, recipe, checkpoint = load_language_model(place.path)
    trained = trained_context(recipe.train, checkpoint.step)
    # a first token that begins the text, the context, and what is predicted after it
    needed = context + reading.STRETCH + 1
    if text is None:
        dataset = prepare(recipe.data, tokenizer=tokenizer, progress=tell_now_and_then())
        found = choose(dataset, recipe.data, needed)
    else:
        found = read_file(text, tokenizer, needed, model.memory_tokens)
    precision = resolve_precision(recipe.train.precision, model.embedding.weight.device)
    if weights != "fp32":
        precision = precision_of(weights, model)

    def read(kept: StateFormat) -> LongReading:
        engine = Engine(model, weights=weights, precision=precision, chunk_len=chunk, kept=kept)
        return _read_once(
            engine, tokenizer, found.tokens_T, context, chunk=chunk, recall=recall, told=told
        )

    # what the changes cost is measured, so the model as it was trained reads first
    changes = _changes(model, kept, yarn, context)
    as_trained = read(StateFormat()) if changes else None
    if kept.kv_window is not None:
        limit_windows(model, kept.kv_window)
    if yarn is not None:
        stretch_positions(model, yarn, trained)
    result = read(kept)
    report = LongContextReport(
        **dict(result),
        run=place.name,
        step=checkpoint.step,
        parameters=model.num_parameters(),
        text=found.name,
        text_tokens=len(found.tokens_T),
        seen_in_training=found.seen,
        context=context,
        trained_context=trained,
        chunk=chunk,
        precision=precision,
        weights=weights,
        changes=changes,
        as_trained=as_trained,
        seconds=time.perf_counter() - began,
    )
    if save:
        _keep(report, place, text, page)
    return report


def _keep(report: LongContextReport, place: RunPlace, text: Path | None, page: bool) -> None:
    """Writes the report, its picture and, where asked, its page into the run's directory."""
    try:
        write_synced(place.path / PICTURE, draw_long_context(report))
        write_synced(place.path / REPORT, report.model_dump_json(indent=1).encode())
        # a page of an earlier reading would stand beside another picture
        if page or (place.path / PAGE).exists():
            written = long_page(report, PICTURE, _command(report, place, text))
            write_synced(place.path / PAGE, written.encode())
    except OSError as error:
        raise ResourceError(f"{place.path} can't be written: {error}") from error


def _command(report: LongContextReport, place: RunPlace, text: Path | None) -> str:
    """What makes the report again."""
    options = [f"--long-context {report.context}", f"--chunk {report.chunk}"]
    if text is not None:
        options.append(f"--text {shlex.quote(str(text))}")
    if report.weights != "fp32":
        options.append(f"--weights {report.weights}")
    if not report.recall:
        options.append("--no-recall")
    options += [f"--{name.replace('_', '-')} {value}" for name, value in report.changes.items()]
    run = shlex.quote(str(place.path))
    return f"valkyrie eval {run} {' '.join(options)} --report"


def _changes(
    model: HybridLM, kept: StateFormat, yarn: float | None, context: int
) -> dict[str, int | float | str]:
    """What is asked to be changed; UsageError where the model has nothing to change."""
    layers = attention_layers(model)
    turns = any(isinstance(layer.position, RopeConfig) for layer in layers)
    recurs = any(isinstance(module, RWKV7) for module in model.modules())
    kv_dtype = None if kept.kv_dtype == "computed" else kept.kv_dtype
    state_dtype = None if kept.state_dtype == "computed" else kept.state_dtype
    changes: dict[str, int | float | str] = {}
    for switch, value, serves, what in (
        ("kv_window", kept.kv_window, bool(layers), "attention"),
        ("kv_dtype", kv_dtype, bool(layers), "attention"),
        ("state_dtype", state_dtype, recurs, "recurrent layer"),
        ("yarn", yarn, turns, "attention with rotary positions"),
    ):
        if value is None:
            continue
        if not serves:
            option = switch.replace("_", "-")
            raise UsageError(f"--{option} changes nothing: the model has no {what}")
        changes[switch] = value
    window = kept.kv_window
    if window is not None:
        if window >= context:
            raise UsageError(f"--kv-window {window} changes nothing in a context of {context}")
        if all(layer.window is not None and layer.window <= window for layer in layers):
            raise UsageError(
                f"--kv-window {window} changes nothing: no attention layer sees more tokens"
            )
    if yarn == 1:
        raise UsageError("--yarn 1 changes nothing: it stretches positions by no more than that")
    return changes


def _read_once(
    engine: Engine,
    tokenizer: Tokenizer,
    tokens_T: npt.NDArray[np.int64],
    context: int,
    *,
    chunk: int,
    recall: bool,
    told: reading.Told | None,
) -> LongReading:
    lengths = token_lengths(tokenizer)
    carried = reading.read_carried(engine, tokens_T[: context + 1], chunk=chunk, told=told)
    contexts = reading.context_lengths(context)
    by_context = reading.read_by_context(engine, tokens_T, lengths, contexts=contexts, told=told)
    best = reading.effective_length(by_context)
    cases = []
    if recall:
        memory = engine.model.memory_tokens
        filler = tokens_T[1 + memory :].tolist()
        cases = cached_cases(cache_dir(), tokenizer, filler, contexts, memory_tokens=memory)
    answers = measure_recall(engine, tokenizer, cases, told=told)
    return LongReading(
        by_position=[
            PositionScore(start=start, end=end, bpb=bpb)
            for start, end, bpb in reading.by_position(carried.nats_T, tokens_T, lengths)
        ],
        by_context=[
            ContextScore(context=length, bpb=float(bpb))
            for length, bpb in zip(by_context.contexts, by_context.bits_per_byte(), strict=True)
        ],
        targets=by_context.nats_CM.shape[1] * reading.STRETCH,
        stretches=by_context.nats_CM.shape[1],
        effective_length=EffectiveContext(tokens=best.tokens, low=best.low, high=best.high),
        recall=[RecallScore(**score._asdict()) for score in summarise(answers)],
        memory=[LengthCost(**mark._asdict()) for mark in carried.marks],
    )
