"""When a token has been thought about for long enough: rules that look at that token alone.

A rule sees what stands at a token after a loop, what stood there before it, and what the head makes
of it. It never looks at another token, so that nothing tells of the future.

Shapes: R tokens that are not done, D model, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field
from torch import Tensor, nn

from valkyrie_core.config import Config

Memory = tuple[Tensor, ...]
"""What a rule keeps of every token from loop to loop."""
Readout = Callable[[Tensor], Tensor]
"""Logits [R, V] of what stands at tokens."""


class Thought(NamedTuple):
    """One loop's work on the tokens that it was about."""

    before_RD: Tensor
    after_RD: Tensor
    readout: Readout


class LatentConfig(Config):
    """What stands at the token hardly moves any more (Huginn, arXiv 2502.05171)."""

    type: Literal["latent"] = "latent"
    threshold: float = Field(default=0.03, gt=0)
    """The length of the last move over the length of what stands there."""
    min_loops: int = Field(default=1, ge=1)
    """No token halts before."""

    def build(self, dim: int) -> Latent:
        """The rule."""
        return Latent(self)


class KLConfig(Config):
    """What the head says hardly changes any more (Huginn, arXiv 2502.05171)."""

    type: Literal["kl"] = "kl"
    threshold: float = Field(default=1e-3, gt=0)
    """KL divergence, in nats, of what is said now from what was said before."""
    min_loops: int = Field(default=1, ge=1)
    """No token halts before."""

    def build(self, dim: int) -> KL:
        """The rule."""
        return KL(self)


class ArgmaxConfig(Config):
    """The likeliest answer has been the same for some loops."""

    type: Literal["argmax"] = "argmax"
    patience: int = Field(default=2, ge=2)
    """Loops with one answer."""
    min_loops: int = Field(default=1, ge=1)
    """No token halts before."""

    def build(self, dim: int) -> Argmax:
        """The rule."""
        return Argmax(self)


class ConfidenceConfig(Config):
    """A learned confidence that the present answer is the one that all loops would give.

    It is trained beside the model, of all tokens, and does not move it; at first nothing halts, as
    a rule that starts shallow stays shallow (arXiv 2604.21999).
    """

    type: Literal["confidence"] = "confidence"
    threshold: float = Field(default=0.9, gt=0, lt=1)
    """The confidence from which a token is done."""
    min_loops: int = Field(default=1, ge=1)
    """No token halts before."""
    bias: float = -3.0
    """Of the logit, at first."""
    then: Literal["halt", "cheapest"] = "halt"
    """What becomes of a token that is sure. halt: no later loop is about it. cheapest: in later
    loops routers send it through their cheapest mixer, and the rest of the blocks goes on."""

    def build(self, dim: int) -> Confidence:
        """The rule."""
        return Confidence(dim, self)


Halting = Annotated[
    LatentConfig | KLConfig | ArgmaxConfig | ConfidenceConfig, Discriminator("type")
]


class Latent(nn.Module):
    """See `LatentConfig`."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.min_loops, self.threshold = config.min_loops, config.threshold

    def begin(self, num_tokens: int, like: Tensor) -> Memory:
        """Nothing is kept."""
        return ()

    def forward(self, thought: Thought, memory: Memory) -> tuple[Tensor, Memory]:
        """Which tokens are done."""
        moved_R = (thought.after_RD - thought.before_RD).norm(dim=-1)
        return moved_R < self.threshold * thought.after_RD.norm(dim=-1), memory


class KL(nn.Module):
    """See `KLConfig`."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.min_loops, self.threshold = config.min_loops, config.threshold

    def begin(self, num_tokens: int, like: Tensor) -> Memory:
        """What was said before is asked again: logits of all tokens would be large."""
        return ()

    def forward(self, thought: Thought, memory: Memory) -> tuple[Tensor, Memory]:
        """Which tokens are done."""
        now_RV = thought.readout(thought.after_RD).log_softmax(-1)
        before_RV = thought.readout(thought.before_RD).log_softmax(-1)
        kl_R = (now_RV.exp() * (now_RV - before_RV)).sum(-1)
        return kl_R < self.threshold, memory


class Argmax(nn.Module):
    """See `ArgmaxConfig`."""

    def __init__(self, config: ArgmaxConfig) -> None:
        super().__init__()
        self.min_loops, self.patience = config.min_loops, config.patience

    def begin(self, num_tokens: int, like: Tensor) -> Memory:
        """The last answer, and for how many loops it has been given."""
        counter = torch.zeros(num_tokens, dtype=torch.int64, device=like.device)
        return counter - 1, counter

    def forward(self, thought: Thought, memory: Memory) -> tuple[Tensor, Memory]:
        """Which tokens are done."""
        last_R, streak_R = memory
        answer_R = thought.readout(thought.after_RD).argmax(-1)
        streak_R = torch.where(answer_R == last_R, streak_R + 1, 1)
        return streak_R >= self.patience, (answer_R, streak_R)


class Confidence(nn.Module):
    """See `ConfidenceConfig`."""

    def __init__(self, dim: int, config: ConfidenceConfig) -> None:
        super().__init__()
        self.min_loops, self.threshold = config.min_loops, config.threshold
        self.then: Literal["halt", "cheapest"] = config.then
        self.weight_D = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.full((), config.bias))

    def begin(self, num_tokens: int, like: Tensor) -> Memory:
        """Nothing is kept."""
        return ()

    def forward(self, thought: Thought, memory: Memory) -> tuple[Tensor, Memory]:
        """Which tokens are done."""
        return self.logits(thought.after_RD).sigmoid() >= self.threshold, memory

    def at(self, threshold: float, min_loops: int) -> Confidence:
        """The same confidence, and another one from which a token is done."""
        other = copy.copy(self)
        other.threshold, other.min_loops = threshold, min_loops
        return other

    def logits(self, h_RD: Tensor) -> Tensor:
        """Of the chance that more loops would give the same answer."""
        # in bf16 all that is fairly sure would be certain
        precise = torch.promote_types(h_RD.dtype, torch.float32)
        scaled_RD = nn.functional.rms_norm(h_RD.to(precise), h_RD.shape[-1:])
        logits_R: Tensor = (scaled_RD * self.weight_D).sum(-1) + self.bias
        return logits_R
