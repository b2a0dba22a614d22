"""How a model is trained: the `train` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, model_validator

from valkyrie_core.config import Config
from valkyrie_core.train.optim import AdamWConfig, Optimizer
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


class SupervisedConfig(Config):
    """Next-token training on the packed corpora."""

    type: Literal["supervised"] = "supervised"
    steps: int = Field(ge=1)
    """Optimizer steps; the horizon of the schedule."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per optimizer step."""
    context_len: int = Field(default=512, ge=2)
    """Tokens per sequence."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step; must divide batch_size."""
    optimizer: Optimizer = AdamWConfig()
    """What turns gradients into updates."""
    schedule: Schedule = CosineConfig()
    """The learning rate over the steps, as a share of each optimizer's peak."""
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the processor computes in it, else fp32."""
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
