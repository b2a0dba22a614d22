"""Short trainings of small models: what a layout makes of text, and what it recalls.

A candidate is trained twice. `language` learns the recipe's own data and is scored in bits per byte
of held-out text; `recall` learns MQAR (`data/tasks/mqar.py`) and is scored by the share of queries
that it answers. The loss is nearly flat in the ratio of attention; recall is what tells layouts
apart (72 models, arXiv 2507.06457).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from valkyrie_core.allocate.candidates import SHORTEST_WINDOW, Candidate, designed, narrowed
from valkyrie_core.config import Config
from valkyrie_core.data.batch import IGNORED, Batch
from valkyrie_core.data.dataset import Dataset
from valkyrie_core.data.tasks.mqar import TEST_FROM, MQARConfig, problems
from valkyrie_core.errors import DivergedError
from valkyrie_core.evaluate.bits import bits_per_byte
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.optim import AdamWConfig, MuonConfig, Optimizer, build_optimizers
from valkyrie_core.train.schedule import CosineConfig, Schedule, lr_scale
from valkyrie_core.train.stages import training_batches

Task = Literal["language", "recall"]
TEST_SEED = 0
"""All models answer the same problems."""


class LanguageProxy(Config):
    """How the text is learned."""

    width: int = Field(default=96, ge=8)
    """Channels of the residual stream; the recipe's where that is less."""
    context_len: int = Field(default=256, ge=2)
    """Tokens per sequence; the recipe's where that is less."""
    batch_size: int = Field(default=4, ge=1)
    """Sequences per step."""
    steps: int = Field(default=200, ge=1)
    """Steps of the last rung."""
    eval_tokens: int = Field(default=16_384, ge=64)
    """Validation tokens per corpus."""


class RecallProxy(Config):
    """How MQAR is learned; Muon and AdamW as they learn it soonest in both kinds of layers."""

    width: int = Field(default=64, ge=8)
    """Channels of the residual stream."""
    batch_size: int = Field(default=16, ge=1)
    """Problems per step."""
    steps: int = Field(default=300, ge=1)
    """Steps of the last rung."""
    test_problems: int = Field(default=64, ge=1)
    """Problems for each number of pairs."""
    mqar: MQARConfig = MQARConfig(vocab_size=128)
    """The problems."""
    optimizer: Optimizer = MuonConfig(lr=2e-2, adamw=AdamWConfig(lr=5e-3))
    """What turns gradients into updates."""


class ProxyConfig(Config):
    """The two proxies of a candidate."""

    language: LanguageProxy = LanguageProxy()
    recall: RecallProxy = RecallProxy()


class Job(Config):
    """One training: everything that its result depends on, beside the recipe and the settings."""

    candidate: str
    layers: tuple[str, ...]
    window: int | None
    task: Task
    rung: int
    seed: int
    steps: int

    @property
    def file(self) -> str:
        """Where the result lies in the queue's folder."""
        return f"{self.candidate}-rung{self.rung}-seed{self.seed}-{self.task}.json"


class Score(Config):
    """What came out of one training."""

    job: Job
    parameters: int
    """Of the proxy."""
    bpb: float | None = None
    """Of `language`: bits per byte of the held-out text; None where it diverged."""
    recall: dict[int, float] = Field(default_factory=dict)
    """Of `recall`: the share of queries that were answered, by number of pairs."""
    seconds: float

    @model_validator(mode="after")
    def _tells_its_number(self) -> Score:
        if (self.job.task == "recall") != bool(self.recall):
            raise ValueError("a score of recall, and no other, tells what was recalled")
        return self


def proxy_model(recipe: Recipe, job: Job, config: ProxyConfig) -> ModelConfig:
    """The small model of a job; all candidates of a task have equal parameters."""
    language, mqar = job.task == "language", config.recall.mqar
    length = language_context(recipe, config) if language else mqar.length
    # a window is as large a share of the proxy's context as it is of the recipe's
    shortened = length / recipe.train.context_len
    small = narrowed(
        recipe.model,
        config.language.width if language else config.recall.width,
        vocab_size=None if language else mqar.vocab_size,
        shortened=shortened,
    )
    window = None if job.window is None else max(SHORTEST_WINDOW, round(job.window * shortened))
    return designed(small, Candidate(job.candidate, job.layers, window))


def language_context(recipe: Recipe, config: ProxyConfig) -> int:
    """Tokens per sequence of the proxies that learn text."""
    return min(config.language.context_len, recipe.train.context_len)


def run(
    recipe: Recipe,
    config: ProxyConfig,
    job: Job,
    *,
    dataset: Callable[[], Dataset],
    poll: Callable[[], None],
) -> Score:
    """Trains and scores one proxy; the same on every call with as many threads.

    Args:
        dataset: the recipe's data, asked for by `language` only.
        poll: called before every step; what it raises ends the training.
    """
    began = time.perf_counter()
    torch.manual_seed(job.seed)
    model = HybridLM(proxy_model(recipe, job, config))
    if job.task == "language":
        data, own = dataset(), config.language
        length = language_context(recipe, config)
        train = SupervisedConfig(steps=job.steps, batch_size=own.batch_size, context_len=length)
        batch = training_batches(data, train, job.seed)
        learns = fit(model, batch, job.steps, recipe.train.optimizer, recipe.train.schedule, poll)
        bpb = _bits(model, data, length, own.eval_tokens) if learns else None
        recall: dict[int, float] = {}
    else:
        mqar, count, bpb = config.recall.mqar, config.recall.batch_size, None
        fit(
            model,
            lambda step: problems(mqar, job.seed, step * count, count),
            job.steps,
            config.recall.optimizer,
            CosineConfig(),
            poll,
        )
        recall = recalled(model, mqar, config.recall.test_problems)
    return Score(
        job=job,
        parameters=model.num_parameters(),
        bpb=bpb,
        recall=recall,
        seconds=time.perf_counter() - began,
    )


def fit(
    model: HybridLM,
    batch: Callable[[int], Batch],
    steps: int,
    optimizer: Optimizer,
    schedule: Schedule,
    poll: Callable[[], None],
) -> bool:
    """Trains for so many steps; False where the loss stopped being finite."""
    optimizers = build_optimizers(optimizer, model)
    # a warm-up longer than a tenth of a short training would be most of it
    warmup = min(schedule.warmup_steps, max(1, steps // 10))
    schedule = schedule.model_copy(update={"warmup_steps": warmup})
    for step in range(steps):
        poll()
        tokens_BT, targets_BT, doc_BT = batch(step)
        state = model.init_state(tokens_BT.shape[0])
        loss, _, _ = model.loss(tokens_BT, targets_BT, state, doc_BT)
        if not math.isfinite(loss.item()):
            return False
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.set_lr_scale(lr_scale(schedule, step, steps))
        optimizers.step()
        optimizers.zero_grad()
    return True


def recalled(model: HybridLM, mqar: MQARConfig, count: int) -> dict[int, float]:
    """The share of queries whose value is the likeliest token, by number of pairs."""
    shares = {}
    for pairs in mqar.pairs:
        tokens_BT, targets_BT, _ = problems(mqar, TEST_SEED, TEST_FROM, count, pairs)
        with torch.inference_mode():
            logits_BTV: Tensor = model(tokens_BT, model.init_state(count)).logits_BTV
        right_BT = logits_BTV.argmax(-1) == targets_BT
        shares[pairs] = float(right_BT[targets_BT != IGNORED].double().mean())
    return shares


def _bits(model: HybridLM, dataset: Dataset, context_len: int, max_tokens: int) -> float | None:
    """Bits per byte over all corpora together; None where the last update made it diverge."""
    try:
        scores = [
            bits_per_byte(
                model,
                corpus.validation,
                context_len=context_len,
                context="window",
                max_tokens=max_tokens,
            )
            for corpus in dataset.corpora.values()
        ]
    except DivergedError:
        return None
    return sum(x.nats for x in scores) / math.log(2) / sum(x.bytes for x in scores)
