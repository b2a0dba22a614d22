"""RWKV-7 at several scales of time: heads that forget in bands, or one mixer at several strides.

Bands: the half-lives of the channels are spread evenly over scales, short in the first head and
long in the last; in deeper layers no decay is faster than a bound, which rises with depth, so that
lower layers may forget at once and upper ones have to remember. Spread decays are RetNet's (Sun et
al. 2023, arXiv 2307.08621), bounds that rise with depth HGRN's (Qin et al. 2023, 2311.04823).

Strides: for each stride a mixer of its own reads the means of so many tokens, complete groups
alone; a token gets what the latest one said, and the strides are added.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.config import Config, MisfitError
from valkyrie_core.kernels.time_mix import DECAY_SCALE
from valkyrie_core.nn.groups import find_groups
from valkyrie_core.nn.rwkv import RWKV7, RWKV7Config
from valkyrie_core.nn.state import Cost, Ctx

SHORTEST = math.log(2) / DECAY_SCALE
"""The half-life of the fastest decay that RWKV-7 has, in tokens: 1.14."""


class BandsConfig(Config):
    """Half-lives in tokens, at the beginning of training and at least."""

    type: Literal["bands"] = "bands"
    shortest: float = Field(default=2.0, gt=SHORTEST)
    """Of the first channel."""
    longest: float = Field(default=1024.0, gt=SHORTEST)
    """Of the last."""
    bound: float = Field(default=0.5, ge=0, lt=1)
    """In the last layer no half-life is shorter than this share of its channel's first; in the
    first layer there is no bound, and between them it rises evenly."""

    @model_validator(mode="after")
    def _rises(self) -> BandsConfig:
        if self.longest <= self.shortest:
            raise MisfitError(f"longest must be above shortest ({self.shortest:g})", ("longest",))
        return self


class StridesConfig(Config):
    """Groups of how many tokens are read."""

    type: Literal["strides"] = "strides"
    strides: tuple[int, ...] = Field(min_length=2)
    """Each has a mixer of its own; 1 reads the tokens themselves."""

    @model_validator(mode="after")
    def _rise(self) -> StridesConfig:
        rising = sorted(set(self.strides))
        if self.strides[0] < 1 or list(self.strides) != rising:
            raise MisfitError("strides are from 1 on and rise, as in [1, 4, 16]", ("strides",))
        return self


class HierarchicalConfig(Config):
    """RWKV-7 at several scales of time."""

    type: Literal["hierarchical"] = "hierarchical"
    inner: RWKV7Config = RWKV7Config()
    """The mixer whose scales these are."""
    scales: Annotated[BandsConfig | StridesConfig, Discriminator("type")] = BandsConfig()
    """bands: in one mixer; strides: a mixer for each."""

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> BandedRWKV7 | StridedRWKV7:
        """The module this section describes."""
        kind = BandedRWKV7 if isinstance(self.scales, BandsConfig) else StridedRWKV7
        return kind(dim, self, layer_idx=layer_idx, num_layers=num_layers)


class BandedRWKV7(RWKV7):
    """An RWKV-7 time mix whose channels forget at scales of their own."""

    def __init__(
        self, dim: int, config: HierarchicalConfig, *, layer_idx: int, num_layers: int
    ) -> None:
        super().__init__(dim, config.inner, layer_idx=layer_idx, num_layers=num_layers)
        bands = config.scales
        assert isinstance(bands, BandsConfig)
        depth = layer_idx / (num_layers - 1) if num_layers > 1 else 0.0
        ratio = bands.longest / bands.shortest
        half_lives = [bands.shortest * ratio ** (i / (dim - 1)) for i in range(dim)]
        # numbers and no tensor: they are there on whatever device a model is built, `meta` included
        self.fastest = tuple(
            SHORTEST / max(SHORTEST, depth * bands.bound * half_life) for half_life in half_lives
        )
        """The largest decay rate of every channel, of the largest that RWKV-7 has."""
        rate_D = torch.tensor(
            [SHORTEST / h / f for h, f in zip(half_lives, self.fastest, strict=True)]
        )
        with torch.no_grad():
            self.w0.copy_(rate_D.logit())

    def decay_rows(self, row_BTD: Tensor) -> Tensor:
        """Rows for which the kernels' sigmoid(w0 + row) is fastest * sigmoid(w0 + given row)."""
        if min(self.fastest) == 1:
            return row_BTD
        precise = torch.promote_types(row_BTD.dtype, torch.float32)
        fastest_D = torch.tensor(self.fastest, dtype=precise, device=row_BTD.device)
        # channels without a bound keep their row; what is not taken must be finite all the same
        bound_D = torch.where(fastest_D < 1, fastest_D, 0.5)
        logit_BTD = self.w0.to(precise) + row_BTD.to(precise)
        rate_BTD = bound_D * logit_BTD.sigmoid()
        bounded_BTD = bound_D.log() + F.logsigmoid(logit_BTD) - torch.log1p(-rate_BTD)
        moved_BTD = (bounded_BTD - self.w0.to(precise)).to(row_BTD.dtype)
        return torch.where(fastest_D < 1, moved_BTD, row_BTD)


class StridedRWKV7(nn.Module):
    """RWKV-7 time mixes over groups of tokens; its states are theirs, with what is open."""

    def __init__(
        self, dim: int, config: HierarchicalConfig, *, layer_idx: int, num_layers: int
    ) -> None:
        super().__init__()
        assert isinstance(config.scales, StridesConfig)
        self.strides = config.scales.strides
        self.dim = dim
        self.mixers = nn.ModuleList(
            # groups have no values of a first layer's tokens
            RWKV7(
                dim,
                config.inner,
                layer_idx=layer_idx,
                num_layers=num_layers,
                mixes_values=stride == 1,
            )
            for stride in self.strides
        )

    @property
    def each(self) -> list[RWKV7]:
        """The mixers, that of the shortest stride first."""
        return list(self.mixers)  # type: ignore[arg-type]

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """By stride: tokens read, the sums of open groups, what was said last, the mixer's own."""
        states: list[Any] = []
        precise = torch.promote_types(dtype, torch.float32)
        for stride, mixer in zip(self.strides, self.each, strict=True):
            own = mixer.init_state(batch_size, device=device, dtype=dtype)
            if stride > 1:
                read_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
                open_BD = torch.zeros(batch_size, self.dim, device=device, dtype=precise)
                said_BD = torch.zeros(batch_size, self.dim, device=device, dtype=dtype)
                states.append((read_B, open_BD, said_BD, own))
            else:
                states.append(own)
        return tuple(states)

    def forward(
        self, x_BTD: Tensor, state: tuple[Any, ...], ctx: Ctx
    ) -> tuple[Tensor, tuple[Any, ...], Ctx]:
        """Reads a window at every stride."""
        y_BTD, after = torch.zeros_like(x_BTD), []
        for stride, mixer, own in zip(self.strides, self.each, state, strict=True):
            if stride == 1:
                own_BTD, own, ctx = mixer(x_BTD, own, ctx)
            else:
                own_BTD, own = self._by_groups(stride, mixer, x_BTD, own, ctx)
            y_BTD = y_BTD + own_BTD
            after.append(own)
        return y_BTD, tuple(after), ctx

    @staticmethod
    def _by_groups(
        stride: int, mixer: RWKV7, x_BTD: Tensor, state: tuple[Any, ...], ctx: Ctx
    ) -> tuple[Tensor, tuple[Any, ...]]:
        read_B, open_BD, said_BD, own = state
        groups = find_groups(read_B, ctx, stride)
        mean_BGD, open_BD = groups.summaries(x_BTD, open_BD)
        y_BGD = torch.zeros_like(mean_BGD)
        # decoding: most tokens complete no group
        if x_BTD.shape[1] > 1 or bool(groups.real_BG.any()):
            y_BGD, own, _ = mixer(mean_BGD, own, groups.context(ctx))
        y_BTD, said_BD = groups.latest(y_BGD, said_BD)
        return y_BTD, (groups.read_B, open_BD, said_BD, own)

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """Of the mixers, each by the groups that it reads; the last token's is the mean."""
        flops = training = decode = size = 0
        for stride, mixer in zip(self.strides, self.each, strict=True):
            own = mixer.cost(context_len, value_bytes)
            share = -(-context_len // stride) / context_len
            flops += round(share * own.flops_per_token)
            training += round(share * own.training_flops)
            decode += own.decode_flops // stride
            size += own.state_bytes
            if stride > 1:
                # the sums are in fp32, and of tokens read there is a count
                size += (max(value_bytes, 4) + value_bytes) * self.dim + 8
        return Cost(flops, training, decode, size)
