"""Talking to a run: one continuation, or a conversation.

Parts are imported where they are used, as in the package itself, which offers all of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import ValidationError

from valkyrie_core.errors import UsageError
from valkyrie_core.inventory import find_run
from valkyrie_core.paths import typed_path
from valkyrie_core.report import ChatReport, ChatTurn, GenerateReport, Sampling, Weights

if TYPE_CHECKING:
    from valkyrie_core.infer.chat import ChatSession
    from valkyrie_core.infer.sampling import SamplingConfig
    from valkyrie_core.nn.canvas import Canvas
    from valkyrie_core.nn.models import Model
    from valkyrie_core.train.load import LoadedRun

GENERATE_TOKENS = 200
"""The longest continuation, if nothing else is asked for."""
CHAT_TOKENS = 256
"""The longest answer, if nothing else is asked for."""


class OpenedChat(NamedTuple):
    """A conversation with a run."""

    session: ChatSession
    run: str
    step: int
    knows_conversations: bool
    """Whether the run was trained on any."""


def sampling(
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> SamplingConfig:
    """How to draw tokens; what is None takes its default. UsageError for a wrong value."""
    from valkyrie_core.infer.sampling import SamplingConfig

    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    try:
        return SamplingConfig.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']})"
        ) from error


def generate(
    run: str | Path | None = None,
    *,
    prompt: str,
    sampling: SamplingConfig | None = None,
    max_tokens: int | None = None,
    state: str | Path | None = None,
    on_text: Callable[[str], None] | None = None,
    weights: Weights = "fp32",
    halt: str | None = None,
    runs_dir: str | Path = "runs",
) -> GenerateReport:
    """Continues a text; of a canvas: its likeliest answer to a question.

    Args:
        state: a file of `read` or `ChatSession.save_state`: the prompt goes on with what it read.
        sampling: how tokens are drawn; see `sampling`.
        max_tokens: at most so many; GENERATE_TOKENS if left out.
        on_text: told every piece of text as soon as it is known.
        weights: the format of the matrices; bf16 and int8 are faster, `evaluate` tells their cost.
        halt: what ends the thought about a token of a looped model; see `evaluate`. None: nothing.
    """
    from valkyrie_core.infer.continuation import Continuation
    from valkyrie_core.infer.sampling import SamplingConfig
    from valkyrie_core.infer.state_file import read_state
    from valkyrie_core.nn.canvas import Canvas
    from valkyrie_core.runs.halting import halting_model
    from valkyrie_core.train.load import language_model, load_run

    place = find_run(run, runs_dir)
    run_of = load_run(place.path)
    if isinstance(run_of.model, Canvas):
        asked = sampling or SamplingConfig()
        if asked != SamplingConfig() or max_tokens is not None or state is not None or halt:
            raise UsageError(
                "a canvas gives its likeliest answer after all steps, all of it at once",
                hint="leave out how tokens are drawn, how many, the state, and --halt",
            )
        return _answer(place.name, run_of, run_of.model, prompt, weights, on_text)
    loaded = language_model(run_of)
    halting_model(place, loaded, halt)
    config = sampling or SamplingConfig()
    limit = max_tokens or GENERATE_TOKENS
    saved = None
    if state is not None:
        if not prompt:
            raise UsageError("a state goes on with a prompt of at least one character")
        saved = read_state(typed_path(state), loaded.model, loaded.tokenizer)
    continuation = Continuation(
        loaded.model,
        loaded.tokenizer,
        prompt,
        config,
        max_tokens=limit,
        saved=saved,
        weights=weights,
        precision=precision_of(weights, loaded.model),
    )
    began = time.perf_counter()
    pieces = []
    for piece in continuation:
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)
    seconds = time.perf_counter() - began
    return GenerateReport(
        run=place.name,
        step=loaded.checkpoint.step,
        prompt=prompt,
        text="".join(pieces),
        prompt_tokens=continuation.prompt_tokens,
        tokens=continuation.tokens,
        stopped_by="end" if continuation.ended else "max_tokens",
        seconds=seconds,
        tokens_per_second=continuation.tokens_per_second,
        weights=weights,
        sampling=_sampling_report(config, limit),
    )


def precision_of(weights: Weights, model: Model) -> Literal["fp32", "bf16"]:
    """What matrix products over a prompt are computed in: fp32 weights in fp32, others in bf16
    where the device has it."""
    import torch

    from valkyrie_core.machine.hardware import supports_bf16

    narrow = weights != "fp32" or model.matrices == torch.bfloat16
    device = model.embedding.weight.device
    return "bf16" if narrow and supports_bf16(device.type) else "fp32"


def _sampling_report(config: SamplingConfig, max_tokens: int) -> Sampling:
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        max_tokens=max_tokens,
    )


def _answer(
    name: str,
    loaded: LoadedRun,
    canvas: Canvas,
    question: str,
    weights: Weights,
    on_text: Callable[[str], None] | None,
) -> GenerateReport:
    """What a canvas answers."""
    from valkyrie_core.infer.answer import answered_by
    from valkyrie_core.infer.sampling import SamplingConfig
    from valkyrie_core.nn.weights import rounded

    began = time.perf_counter()
    model = rounded(canvas, weights, precision_of(weights, canvas))
    text = answered_by(model, loaded.tokenizer, question)
    if on_text is not None:
        on_text(text)
    seconds = time.perf_counter() - began
    return GenerateReport(
        run=name,
        step=loaded.checkpoint.step,
        prompt=question,
        text=text,
        prompt_tokens=len(loaded.tokenizer.encode(question)),
        tokens=len(loaded.tokenizer.encode(text)),
        stopped_by="end",
        seconds=seconds,
        tokens_per_second=None,
        weights=weights,
        sampling=_sampling_report(SamplingConfig(temperature=0), canvas.cells),
    )


def open_chat(
    run: str | Path | None = None,
    *,
    sampling: SamplingConfig | None = None,
    max_tokens: int | None = None,
    state: str | Path | None = None,
    weights: Weights = "fp32",
    halt: str | None = None,
    runs_dir: str | Path = "runs",
) -> OpenedChat:
    """A conversation with a run.

    Args:
        state: a file of `read` or `ChatSession.save_state`: the conversation begins after it.
        sampling: how tokens are drawn; see `sampling`.
        max_tokens: at most so many per answer; CHAT_TOKENS if left out.
        weights: the format of the matrices; bf16 and int8 are faster, `evaluate` tells their cost.
        halt: what ends the thought about a token of a looped model; see `evaluate`. None: nothing.
    """
    from valkyrie_core.data.formats import TextFormat
    from valkyrie_core.infer.chat import ChatSession
    from valkyrie_core.infer.sampling import SamplingConfig
    from valkyrie_core.runs.halting import halting_model
    from valkyrie_core.train.load import load_language_model

    place = find_run(run, runs_dir)
    loaded = load_language_model(place.path)
    halting_model(place, loaded, halt)
    session = ChatSession(
        loaded.model,
        loaded.tokenizer,
        sampling or SamplingConfig(),
        max_tokens=max_tokens or CHAT_TOKENS,
        weights=weights,
        precision=precision_of(weights, loaded.model),
    )
    if state is not None:
        session.load_state(typed_path(state))
    formats = [corpus.format for corpus in loaded.recipe.data.corpora.values()]
    return OpenedChat(
        session=session,
        run=place.name,
        step=loaded.checkpoint.step,
        knows_conversations=not all(isinstance(one, TextFormat) for one in formats),
    )


def chat_report(chat: OpenedChat, turns: list[ChatTurn]) -> ChatReport:
    """A conversation as one report."""
    return ChatReport(
        run=chat.run,
        step=chat.step,
        answer=turns[-1].answer if turns else "",
        tokens=sum(turn.tokens for turn in turns),
        prompt_tokens=sum(turn.prompt_tokens for turn in turns),
        seconds=sum(turn.seconds for turn in turns),
        turns=turns,
        weights=chat.session.engine.weights,
        sampling=_sampling_report(chat.session.sampling, chat.session.max_tokens),
    )
