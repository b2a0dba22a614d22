"""Training, with all parts wired together: data, trainer, validation, samples, report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch

from valkyrie_core import kernels
from valkyrie_core.cache import cache_dir
from valkyrie_core.data.dataset import Dataset, prepare
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.evaluate.bits import bits_per_byte
from valkyrie_core.infer.answer import answered_by
from valkyrie_core.infer.continuation import Continuation
from valkyrie_core.infer.sampling import SamplingConfig
from valkyrie_core.machine.hardware import matmul_peak
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.models import Model, build_model
from valkyrie_core.nn.position import AlibiConfig
from valkyrie_core.nn.rwkv import RWKV7Config
from valkyrie_core.nn.skip import SkipConfig
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import CorpusCounts, SplitCounts, TrainReport
from valkyrie_core.runs.fitting import fitted
from valkyrie_core.runs.prediction import Prediction, measured
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.device import resolve_device, resolve_precision
from valkyrie_core.train.progress import StepEvent, Validation
from valkyrie_core.train.session import TrainResult, train_run
from valkyrie_core.train.stages import stages

log = logging.getLogger("valkyrie")

EVAL_BATCH_SIZE = 8
"""Windows side by side, at most; changes the speed of a validation, not its score."""
SAMPLE_TOKENS = 200
"""How long the continuations in samples.md are."""


def train_recipe(
    recipe: Recipe,
    *,
    resume: bool,
    steps: int | None,
    extend_steps: int | None,
    progress: Callable[[StepEvent], None],
    resume_command: str,
) -> TrainReport:
    """See `valkyrie_core.runs.train`."""
    recipe = fitted(recipe, goes_on=resume or extend_steps is not None, steps=steps)
    peak_flops = _peak_flops(recipe)
    prediction = Prediction(recipe, progress)
    result = train_run(
        recipe,
        prepare=lambda tokenizer: _prepare(recipe, tokenizer),
        evaluate=lambda model, dataset, poll: _validate(recipe, model, dataset, poll),
        sample=lambda model, dataset, prompt, poll: _sample(recipe, model, dataset, prompt, poll),
        resume=resume,
        steps=steps,
        extend_steps=extend_steps,
        progress=prediction,
        peak_flops=peak_flops,
        command=resume_command.removesuffix(" --resume"),
        resume_command=resume_command,
    )
    report = _report(result, peak_flops).model_copy(
        update={
            "predicted": prediction.predicted,
            "measured": measured(recipe, result.tokens_per_second),
        }
    )
    result.run.storage.replace_json(result.run.report_file, report.model_dump(mode="json"))
    return report


def describe_kernels(recipe: Recipe, device: torch.device) -> dict[str, str]:
    """Which implementation computes each kind of mixer in the recipe's model."""
    forms: dict[str, str] = {}
    for _, mixer in recipe.model.mixers():
        if isinstance(mixer, SkipConfig):
            continue
        if isinstance(mixer, RWKV7Config):
            form = kernels.available(mixer.head_dim)[0] if device.type == "cpu" else "chunked"
            forms[mixer.type] = form
        elif mixer.window is not None or isinstance(mixer.position, AlibiConfig):
            # said, since it is slower than the same without: no fused kernel knows them
            forms[f"{mixer.type} with window or alibi"] = "PyTorch, 128 queries at a time"
        elif mixer.normalizer == "sparsemax":
            forms[f"{mixer.type} with sparsemax"] = "PyTorch, 128 queries at a time"
        else:
            forms[mixer.type] = "scaled_dot_product_attention"
    return forms


def _peak_flops(recipe: Recipe) -> float:
    device = resolve_device(recipe.device)
    precision = resolve_precision(recipe.train.precision, device)
    peak = matmul_peak(precision, cache_dir=cache_dir(), device=str(device))
    return peak.flops_per_second


def _prepare(recipe: Recipe, tokenizer: Tokenizer | None) -> Dataset:
    with torch.device("meta"):
        model = build_model(recipe.model)
    forms = describe_kernels(recipe, resolve_device(recipe.device))
    log.info(
        "model: %d layers, %s parameters; %s",
        len(recipe.model.core.layers),
        f"{model.num_parameters():,}",
        ", ".join(f"{mixer}: {form}" for mixer, form in forms.items()),
    )
    return prepare(recipe.data, tokenizer=tokenizer, progress=tell_now_and_then())


def tell_now_and_then(
    seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
) -> Callable[[str, int, int], None]:
    """A progress callback that logs a line every so many seconds: short work says nothing."""
    told = clock()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal told
        if clock() - told >= seconds:
            told = clock()
            log.info("%s: %d of %d", what, done, total)

    return tell


def _asks(poll: Callable[[], None]) -> Callable[[], bool]:
    """A poll that raises as one that answers."""

    def stop() -> bool:
        poll()
        return False

    return stop


def _validate(
    recipe: Recipe, model: Model, dataset: Dataset, poll: Callable[[], None]
) -> Validation:
    """The same score as `evaluate`, on the first train.eval_tokens of each corpus."""
    nats, num_bytes = 0.0, 0
    by_corpus = {}
    for name, corpus in dataset.corpora.items():
        bits = bits_per_byte(
            model,
            corpus.validation,
            context_len=recipe.train.longest_context,
            batch_size=_windows_at_once(recipe.train),
            context="window",
            max_tokens=recipe.train.eval_tokens,
            stop=_asks(poll),
        )
        nats, num_bytes = nats + bits.nats, num_bytes + bits.bytes
        by_corpus[name] = bits.bpb
    return Validation(nats / math.log(2) / num_bytes, by_corpus)


def _windows_at_once(train: SupervisedConfig) -> int:
    """No more tokens than a micro-batch has: a validation must fit where training does."""
    first = stages(train)[0]
    tokens = first.micro_size * first.context_len
    return max(1, min(EVAL_BATCH_SIZE, tokens // train.longest_context))


def _sample(
    recipe: Recipe, model: Model, dataset: Dataset, prompt: str, poll: Callable[[], None]
) -> str:
    if isinstance(model, Canvas):
        return answered_by(model, dataset.tokenizer, prompt)
    continuation = Continuation(
        model,
        dataset.tokenizer,
        prompt,
        SamplingConfig(seed=recipe.seed),
        max_tokens=SAMPLE_TOKENS,
        stop=_asks(poll),
    )
    return "".join(continuation)


def _report(result: TrainResult, peak_flops: float) -> TrainReport:
    validation = result.validation
    seconds = result.seconds
    return TrainReport(
        run=result.run.name,
        directory=str(result.run.path),
        steps=result.step,
        total_steps=result.horizon,
        finished=result.finished,
        tokens_seen=result.tokens_seen,
        seconds=seconds,
        # a sitting that had nothing left to do still tells the run's speed
        tokens_per_second=result.tokens_per_second
        or (result.tokens_seen / seconds if seconds else None),
        train_loss=result.train_loss,
        val_bpb=validation.bpb if validation else None,
        val_bpb_by_corpus=dict(validation.by_corpus) if validation else {},
        best_val_bpb=result.best_bpb,
        best_step=result.best_step,
        parameters=result.parameters,
        device=str(result.device),
        precision=result.precision,
        threads=torch.get_num_threads(),
        kernels=describe_kernels(result.recipe, result.device),
        peak_flops=peak_flops,
        mfu=result.mfu,
        checkpoint=str(result.checkpoint),
        data_fingerprint=result.dataset.fingerprint,
        corpora={
            name: CorpusCounts(
                train=_counts(corpus.train),
                validation=_counts(corpus.validation),
                dropped=corpus.dropped,
                truncated=corpus.truncated,
            )
            for name, corpus in result.dataset.corpora.items()
        },
    )


def _counts(split: PackedSplit) -> SplitCounts:
    counts = split.counts
    return SplitCounts(
        documents=counts.documents,
        tokens=counts.tokens,
        bytes=counts.bytes,
        bytes_per_token=counts.bytes_per_token if counts.tokens else None,
    )
