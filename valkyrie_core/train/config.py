"""How a model is trained: the `train` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, model_validator

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.train.optim import AdafactorConfig, AdamWConfig, Optimizer
from valkyrie_core.train.schedule import CosineConfig, Schedule


class CompileConfig(Config):
    """torch.compile with static shapes: faster steps after a first step of up to a minute."""

    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """Passed to torch.compile."""


class TensorBoardConfig(Config):
    """Mirrors the metrics to TensorBoard event files in the run directory."""

    type: Literal["tensorboard"] = "tensorboard"


class TrackioConfig(Config):
    """Mirrors the metrics to Trackio (a local database)."""

    type: Literal["trackio"] = "trackio"
    project: str = "valkyrie"
    """The project's name."""


class WandbConfig(Config):
    """Mirrors the metrics to Weights & Biases."""

    type: Literal["wandb"] = "wandb"
    project: str = "valkyrie"
    """The project's name."""
    mode: Literal["online", "offline"] = "offline"
    """Offline by default: nothing leaves the machine unless the recipe says so."""


Track = Annotated[TensorBoardConfig | TrackioConfig | WandbConfig, Discriminator("type")]


class ContextStage(Config):
    """From some step on, sequences are longer; as many fewer of them make a step."""

    from_fraction: float = Field(gt=0, lt=1)
    """The share of the steps that come before."""
    context_len: int = Field(ge=2)
    """Tokens per sequence; must divide train.batch_size times train.context_len."""


class StatePassingConfig(Config):
    """Sequences go on where the last step's ended, their state carried without its gradient.

    Truncated back-propagation through time: a row reads a stretch of `span` tokens in consecutive
    chunks of the context's length. A document's end inside the stretch resets the state, and so
    does the stretch's end. Attention sees the keys it has carried: within its `window`, or all of
    the document where it has none.
    """

    span: int = Field(default=16_384, ge=4)
    """Tokens that a row reads in order; a multiple of every context length."""


FittedKey = Literal[
    "activation_checkpointing",
    "grad_accum_steps",
    "batch_size",
    "weights",
    "optimizer",
    "update",
    "context_len",
    "context_schedule",
    "eval_tokens",
    "save_every",
]
"""Keys of `train` that `train.fit` may change."""


class FitConfig(Config):
    """Where the machine is too small: trains in less memory and with fewer tokens per step.

    In this order, as far as it takes: activation checkpointing; smaller micro-batches; matrices in
    bf16 with an adafactor that updates inside the backward pass; shorter contexts. What is changed
    is said, kept in the run's recipe, and stays when the run goes on elsewhere.
    """

    step_seconds: float = Field(default=120, gt=0)
    """A step that would take longer is made of fewer tokens."""
    changed: tuple[FittedKey, ...] = ()
    """Keys of `train` that were changed when a run began; training writes them, leave them out."""


class EMAConfig(Config):
    """What is validated, saved and used is an exponential moving average of the weights.

    Young averages forget faster, by (1 + n) / (10 + n) after n steps, so that what weights were
    drawn as does not linger.
    """

    decay: float = Field(default=0.999, gt=0, lt=1)
    """The share of the average that stays at a step."""


class SupervisedConfig(Config):
    """Next-token training on the packed corpora."""

    type: Literal["supervised"] = "supervised"
    steps: int = Field(ge=1)
    """Optimizer steps; the horizon of the schedule."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per optimizer step."""
    context_len: int = Field(default=512, ge=2)
    """Tokens per sequence."""
    context_schedule: tuple[ContextStage, ...] = ()
    """Longer contexts later in the run, at the same number of tokens per step."""
    state_passing: StatePassingConfig | None = None
    """Carry states from step to step; left out, every sequence starts without one."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step; must divide batch_size."""
    optimizer: Optimizer = AdamWConfig()
    """What turns gradients into updates."""
    schedule: Schedule = CosineConfig()
    """The learning rate over the steps, as a share of each optimizer's peak."""
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    update: Literal["after_backward", "in_backward"] = "after_backward"
    """in_backward: each parameter is updated as soon as its gradient is there, which is then
    forgotten: no memory for gradients. Allows no accumulation, and clips each parameter by its own
    norm."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrices are stored in bf16, half the memory; needs an adafactor optimizer, which
    rounds its updates at random instead of losing them."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the processor computes in it, else fp32."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs and compute the rest again: less memory, slower, same bits."""
    ema: EMAConfig | None = None
    """Average the weights; left out, they are used as they are."""
    fit: FitConfig | None = None
    """Makes the training smaller where it does not fit; left out, it is as it is written."""
    compile: CompileConfig | None = None
    """Compile the model; left out, it runs eagerly."""
    log_every: int = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between validations; left out, a tenth of the steps. The last step always counts."""
    eval_tokens: int = Field(default=65_536, ge=256)
    """Validation tokens per corpus while training; `valkyrie eval` reads everything."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; left out, as eval_every."""
    keep_last: int = Field(default=2, ge=2)
    """How many of the newest checkpoints stay; the best one stays besides."""
    sample_prompts: tuple[str, ...] = ()
    """Continued at every validation and written to samples.md."""
    init_from: str | None = None
    """Start from the weights of this run (a name or a directory)."""
    track: Track | None = None
    """Where metrics go besides metrics.jsonl."""

    @model_validator(mode="after")
    def _accumulation_divides_batch(self) -> SupervisedConfig:
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"grad_accum_steps ({self.grad_accum_steps}) must divide "
                f"batch_size ({self.batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _small_memory_fits(self) -> SupervisedConfig:
        if self.update == "in_backward" and self.grad_accum_steps != 1:
            raise MisfitError(
                "a gradient that is forgotten at once can't be accumulated: with update "
                "in_backward, grad_accum_steps is 1",
                ("grad_accum_steps",),
            )
        if self.weights == "bf16" and self.ema is not None:
            raise MisfitError(
                "an average in bf16 would lose its small updates: leave out ema, or take weights "
                "fp32",
                ("ema",),
            )
        if self.weights == "bf16" and not isinstance(self.optimizer, AdafactorConfig):
            raise MisfitError(
                "weights in bf16 would lose the small updates of "
                f"{self.optimizer.type}: use optimizer adafactor, or weights fp32",
                ("weights",),
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> SupervisedConfig:
        tokens = self.batch_size * self.context_len
        before = 0.0
        for index, stage in enumerate(self.context_schedule):
            at = ("context_schedule", index)
            if tokens % stage.context_len:
                raise MisfitError(
                    f"context_len ({stage.context_len}) must divide the {tokens} tokens of a step",
                    (*at, "context_len"),
                )
            if stage.context_len <= self.context_lens[index]:
                raise MisfitError(
                    f"contexts grow: {stage.context_len} is not longer than the "
                    f"{self.context_lens[index]} before",
                    (*at, "context_len"),
                )
            if stage.from_fraction <= before:
                raise MisfitError(
                    f"stages must follow each other: {stage.from_fraction:g} is not after "
                    f"{before:g}",
                    (*at, "from_fraction"),
                )
            before = stage.from_fraction
        if self.state_passing is not None:
            for length in self.context_lens:
                if self.state_passing.span % length:
                    raise MisfitError(
                        f"span ({self.state_passing.span}) must be a multiple of the context "
                        f"length {length}",
                        ("state_passing", "span"),
                    )
        return self

    @property
    def eval_steps(self) -> int:
        """Steps between validations."""
        return self.eval_every or max(1, self.steps // 10)

    @property
    def save_steps(self) -> int:
        """Steps between checkpoints."""
        return self.save_every or self.eval_steps

    @property
    def context_lens(self) -> tuple[int, ...]:
        """The context length of every stage, in order."""
        return (self.context_len, *(stage.context_len for stage in self.context_schedule))

    @property
    def longest_context(self) -> int:
        """The longest sequence that the run is trained on; validations read windows of it."""
        return self.context_lens[-1]
