"""How positions enter attention: by turning queries and keys, by a bias, or not at all.

Shapes: B batch, T time, N query heads, H head width, C pairs of a head's channels.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from valkyrie_core.config import Config

YARN_FAST, YARN_SLOW = 32.0, 1.0
"""Pairs that turn more often than the first within the trained context stay as they are; those that
turn less often than the second are stretched by the whole factor (the paper's beta and alpha)."""
Angles = tuple[Tensor, Tensor]
"""Cosines and sines [B, T, C] of every token, times the temperature's factor."""


class RopeConfig(Config):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    type: Literal["rope"] = "rope"
    theta: float = Field(default=10_000.0, gt=1)
    """The longest wavelength, in tokens, over 2 pi."""


class YarnConfig(Config):
    """Rotary positions stretched to a longer context (YaRN, Peng et al. 2023, arXiv 2309.00071)."""

    type: Literal["yarn"] = "yarn"
    theta: float = Field(default=10_000.0, gt=1)
    """The longest wavelength before stretching, in tokens, over 2 pi."""
    factor: float = Field(ge=1)
    """How many times longer the context is than the one that was trained; 1 is plain RoPE."""
    trained_context: int = Field(ge=1)
    """Tokens of the context that was trained."""


class AlibiConfig(Config):
    """A penalty on distance that differs by head (ALiBi, Press et al. 2021, arXiv 2108.12409)."""

    type: Literal["alibi"] = "alibi"


class NoPositionConfig(Config):
    """No positions: the order comes from recurrent layers below."""

    type: Literal["none"] = "none"


PositionConfig = Annotated[
    RopeConfig | YarnConfig | AlibiConfig | NoPositionConfig, Field(discriminator="type")
]


class Rotation(NamedTuple):
    """How the pairs (i, i + C) of a head's channels turn with the position."""

    frequency_C: Tensor
    """Radians per token, in fp32 or better."""
    scale: float
    """Queries and keys are multiplied by it: YaRN's square root of 1 / t."""


def rotation(position: PositionConfig, head_dim: int, dtype: torch.dtype) -> Rotation | None:
    """The rotation of C = head_dim // 2 pairs; None where positions turn nothing."""
    if not isinstance(position, RopeConfig | YarnConfig):
        return None
    half = head_dim // 2
    pair_C = torch.arange(half, dtype=torch.promote_types(dtype, torch.float32))
    frequency_C = position.theta ** (-pair_C / half)
    if isinstance(position, RopeConfig):
        return Rotation(frequency_C, 1.0)
    turns_C = position.trained_context * frequency_C / (2 * math.pi)
    kept_C = ((turns_C - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
    stretched_C = frequency_C * (kept_C + (1 - kept_C) / position.factor)
    return Rotation(stretched_C, 0.1 * math.log(position.factor) + 1)


def slopes(position: PositionConfig, num_heads: int) -> tuple[float, ...] | None:
    """2^(-8 h / N) for the heads h = 1 ... N; None where distance is no penalty.

    Numbers and no tensor: they are there on whatever device a model is built, `meta` included.
    """
    if not isinstance(position, AlibiConfig):
        return None
    return tuple(2.0 ** (-8 * head / num_heads) for head in range(1, num_heads + 1))


def rope_angles(pos_BT: Tensor, rotation: Rotation) -> Angles:
    """Cosines and sines [B, T, C] of the angles at these positions."""
    angle_BTC = pos_BT[..., None] * rotation.frequency_C.to(pos_BT.device)
    return angle_BTC.cos() * rotation.scale, angle_BTC.sin() * rotation.scale


def turn(x_BNTH: Tensor, angles: Angles) -> Tensor:
    """Rotary positions, halves paired: the first half of a head with the second."""
    cos, sin = (x_BTC[:, None] for x_BTC in angles)
    half = cos.shape[-1]
    x1, x2, rest = x_BNTH[..., :half], x_BNTH[..., half : 2 * half], x_BNTH[..., 2 * half :]
    turned = [x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest]
    return torch.cat(turned, dim=-1).to(x_BNTH.dtype)
