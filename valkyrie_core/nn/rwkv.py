"""RWKV-7 time mix and channel mix as their author trains them (arXiv 2503.14456).

The layer is its formulas, its initialisation and its parameter groups together: none of the three
works as well without the others. Parameters keep the author's names (x_r, w0, ...), so that a
checkpoint maps one to one; see `nn/rwkv_checkpoint.py`.

Shapes: B batch, T time, D model, N heads, H head width, R rank.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from valkyrie_core.config import Config
from valkyrie_core.kernels.relu_squared import relu_squared
from valkyrie_core.kernels.time_mix import Rows, Vectors, time_mix
from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.state import Cost, Ctx, shift


class RWKV7Config(Config):
    """RWKV-7 time mix: a generalised delta rule with data-dependent decay (arXiv 2503.14456)."""

    type: Literal["rwkv7"] = "rwkv7"
    head_dim: int = Field(default=64, ge=4)
    """Width of one head; `dim` must be a multiple of it."""
    eigenvalues: Literal["positive", "signed"] = "positive"
    """Of one token's transition of the state. positive: as released, above -0.46. signed: the rate
    reaches 1 + decay instead of 1, so that they reach -1 and never pass it: a state can be
    mirrored, which parity and groups need (Grazzi et al. 2024, arXiv 2411.12537)."""
    decay_rank: int | None = Field(default=None, ge=1)
    """Rank of the decay's low-rank map; left out, the author's rule by width."""
    rate_rank: int | None = Field(default=None, ge=1)
    """Rank of the in-context learning rate's map; left out, the author's rule."""
    value_rank: int | None = Field(default=None, ge=1)
    """Rank of the value residual's map; left out, the author's rule."""
    gate_rank: int | None = Field(default=None, ge=1)
    """Rank of the output gate's map; left out, the author's rule."""

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> RWKV7:
        """The module this section describes."""
        return RWKV7(dim, self, layer_idx=layer_idx, num_layers=num_layers)


class ChannelMixConfig(Config):
    """RWKV-7 channel mix: token shift, then a squared-ReLU two-layer network."""

    type: Literal["channel_mix"] = "channel_mix"
    hidden_dim: int | None = Field(default=None, ge=1)
    """Width of the hidden layer; left out, 4 x dim."""

    def build(self, dim: int, *, layer_idx: int, num_layers: int) -> ChannelMix:
        """The module this section describes."""
        return ChannelMix(
            dim, self.hidden_dim or 4 * dim, layer_idx=layer_idx, num_layers=num_layers
        )

    def resized(self, hidden_dim: int) -> ChannelMixConfig:
        """The same, with another hidden width."""
        return self.model_copy(update={"hidden_dim": hidden_dim})


class TimeMixState(NamedTuple):
    """What a time mix remembers: the last token and the matrix state, whatever was read."""

    shift_BD: Tensor
    wkv_BNHH: Tensor
    """[value, key], always fp32 (fp64 in an fp64 model)."""


def low_rank(dim: int, factor: float) -> int:
    """The author's ranks: factor * sqrt(dim), a multiple of 32; 8 or 16 for his small models.

    Below 129 channels the rule would make the low-rank maps half of the layer.
    """
    if dim <= 128:
        return 8 if dim <= 64 else 16
    return max(32, round(factor * math.sqrt(dim) / 32) * 32)


class RWKV7(nn.Module):
    """The time mix; O(T) in time, its state constant in T."""

    roles: ClassVar[dict[str, Role]] = {
        "w0": "decay",
        **dict.fromkeys(("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"), "low_rank"),
    }

    def __init__(
        self,
        dim: int,
        config: RWKV7Config,
        *,
        layer_idx: int,
        num_layers: int,
        mixes_values: bool = True,
    ) -> None:
        """
        Args:
            mixes_values: but in the first layer, values are mixed with those of the first layer.
        """
        super().__init__()
        self.mixes_values = mixes_values and layer_idx > 0
        self.head_dim = config.head_dim
        self.signed = config.eigenvalues == "signed"
        self.num_heads = dim // config.head_dim
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)
        self._init_vectors(dim, layer_idx, num_layers)
        rate = config.rate_rank or low_rank(dim, 2.5)
        self.w1, self.w2 = _factors(dim, config.decay_rank or low_rank(dim, 2.5))
        self.a1, self.a2 = _factors(dim, rate)
        if self.mixes_values:
            self.v1, self.v2 = _factors(dim, config.value_rank or low_rank(dim, 1.7))
        self.g1, self.g2 = _factors(dim, config.gate_rank or low_rank(dim, 5.0))

    def _init_vectors(self, dim: int, layer_idx: int, num_layers: int) -> None:
        # a single layer counts as the first of many
        depth = layer_idx / (num_layers - 1) if num_layers > 1 else 0.0
        rest = 1.0 - layer_idx / num_layers
        channel = torch.arange(dim) / dim
        linear = torch.arange(dim) / (dim - 1) - 0.5
        inside = (torch.arange(dim) % self.head_dim - (self.head_dim - 1) / 2) / (
            (self.head_dim - 1) / 2
        )
        zigzag = inside * inside.abs()

        def mix(power: float) -> nn.Parameter:
            return nn.Parameter(1.0 - channel.pow(power * rest))

        self.x_r, self.x_w, self.x_k = mix(0.2), mix(0.9), mix(0.7)
        self.x_v, self.x_a, self.x_g = mix(0.7), mix(0.9), mix(0.2)
        speed = -6 + 6 * (torch.arange(dim) / (dim - 1)).pow(1 + depth**0.3)
        self.w0 = nn.Parameter(speed + 0.5 + 2.5 * zigzag)
        self.a0 = nn.Parameter(-0.19 + 0.3 * zigzag + 0.4 * linear)
        if self.mixes_values:
            self.v0 = nn.Parameter(0.73 - 0.4 * linear)
        self.k_k = nn.Parameter(0.71 - 0.1 * linear)
        self.k_a = nn.Parameter(torch.full((dim,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.num_heads, self.head_dim), -0.04))
        gain = ((1 + layer_idx) / num_layers) ** 0.7
        self.ln_x_weight = nn.Parameter(torch.full((dim,), gain))
        self.ln_x_bias = nn.Parameter(torch.zeros(dim))

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> TimeMixState:
        """Nothing read yet: zeros."""
        N, H = self.num_heads, self.head_dim
        wkv_dtype = torch.promote_types(dtype, torch.float32)
        return TimeMixState(
            torch.zeros(batch_size, N * H, device=device, dtype=dtype),
            torch.zeros(batch_size, N, H, H, device=device, dtype=wkv_dtype),
        )

    def forward(
        self, x_BTD: Tensor, state: TimeMixState, ctx: Ctx
    ) -> tuple[Tensor, TimeMixState, Ctx]:
        """Reads a window; the first RWKV-7 layer leaves its values in ctx for the later ones."""
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        (xr, xw, xk, xv, xa, xg), last_BD = shift(x_BTD, state.shift_BD, ctx, mixes)
        v = self.value(xv)
        is_first = ctx.v_first_BTD is None
        if is_first:
            ctx = ctx._replace(v_first_BTD=v)
        mixes_values = not is_first and self.mixes_values
        rows = Rows(
            r=self.receptance(xr),
            k=self.key(xk),
            v=v,
            decay=self.decay_rows((xw @ self.w1).tanh() @ self.w2),
            rate=xa @ self.a1 @ self.a2,
            share=xv @ self.v1 @ self.v2 if mixes_values else None,
            v_first=ctx.v_first_BTD if mixes_values else None,
            gate=torch.sigmoid(xg @ self.g1) @ self.g2,
        )
        vectors = Vectors(
            *(self.w0, self.a0, self.v0 if mixes_values else None, self.k_k, self.k_a),
            *(self.r_k.flatten(), self.ln_x_weight, self.ln_x_bias),
        )
        wkv_BNHH = state.wkv_BNHH
        if ctx.fresh_BT is not None:
            wkv_BNHH = wkv_BNHH.masked_fill(self._restarts(ctx), 0)
        z_BTD, wkv_BNHH = time_mix(rows, vectors, wkv_BNHH, ctx.doc_BT, signed=self.signed)
        return self.output(z_BTD), TimeMixState(last_BD, wkv_BNHH), ctx

    def decay_rows(self, row_BTD: Tensor) -> Tensor:
        """What stands beside w0 in the decay; a subclass may bound it."""
        return row_BTD

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """Matrices, low-rank maps and the recurrence: every token alike, whatever was read."""
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2) - self.r_k.numel()
        elements = self.num_heads * self.head_dim**2
        # per state element: decay 1, S a 2, rank-1 updates 4, S r 2
        flops = 2 * matrices + 9 * elements
        wkv_bytes = max(value_bytes, 4) * elements
        return Cost(
            flops_per_token=flops,
            # the backward pass makes the states again, from one that was kept every 32 tokens
            training_flops=3 * flops + 9 * elements,
            decode_flops=flops,
            state_bytes=value_bytes * self.num_heads * self.head_dim + wkv_bytes,
        )

    @staticmethod
    def _restarts(ctx: Ctx) -> Tensor:
        """[B, 1, 1, 1]: rows whose first real token starts a document."""
        assert ctx.fresh_BT is not None
        if ctx.valid_BT is None:
            return ctx.fresh_BT[:, 0, None, None, None]
        first_B1 = ctx.valid_BT.int().argmax(dim=1, keepdim=True)
        return ctx.fresh_BT.gather(1, first_B1)[:, :, None, None]


def _factors(dim: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A low-rank map [D, R] @ [R, D] that starts at zero."""
    return nn.Parameter(torch.zeros(dim, rank)), nn.Parameter(
        nn.init.orthogonal_(torch.empty(rank, dim), gain=0.1)
    )


class ChannelMix(nn.Module):
    """y = W_value relu(W_key (x + (shift(x) - x) * x_k))^2; its state is the last token."""

    def __init__(self, dim: int, hidden_dim: int, *, layer_idx: int, num_layers: int) -> None:
        super().__init__()
        rest = 1.0 - layer_idx / num_layers
        self.x_k = nn.Parameter(1.0 - (torch.arange(dim) / dim).pow(rest**4))
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden layer."""
        return self.key.out_features

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Nothing read yet: zeros [B, D]."""
        return torch.zeros(batch_size, self.x_k.shape[0], device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor, state: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Ctx]:
        """Mixes each token with the one before it, then acts on every position by itself."""
        (mixed_BTD,), last_BD = shift(x_BTD, state, ctx, (self.x_k,))
        return self.value(relu_squared(self.key(mixed_BTD))), last_BD, ctx

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """Two matrices; every token alike."""
        flops = 2 * (self.key.weight.numel() + self.value.weight.numel())
        return Cost(flops, 3 * flops, flops, value_bytes * self.x_k.numel())
