"""Optimizers by parameter role, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field

from valkyrie_core.config import Config


class AdamWConfig(Config):
    """AdamW for every parameter; weight decay on matrices only."""

    type: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, applied to matrices only."""


class MuonConfig(Config):
    """Muon for hidden matrices, AdamW for embeddings, head, vectors and low-rank factors."""

    type: Literal["muon"] = "muon"
    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate of Muon."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum (Nesterov)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of the matrices."""
    adamw: AdamWConfig = AdamWConfig(lr=2e-3)
    """The optimizer of everything that is not a hidden matrix."""


Optimizer = Annotated[AdamWConfig | MuonConfig, Discriminator("type")]


class CosineConfig(Config):
    """Linear warm-up, then half a cosine down to `final_ratio` at the last step."""

    type: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""


class WSDConfig(Config):
    """Warm-up, stable, decay: constant at the peak, then linear down to `final_ratio`."""

    type: Literal["wsd"] = "wsd"
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """The share of all steps, at the end, over which the rate falls."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""


Schedule = Annotated[CosineConfig | WSDConfig, Discriminator("type")]
