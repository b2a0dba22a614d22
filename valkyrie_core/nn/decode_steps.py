"""Fused native steps: norm, sub-layer and residual of one token in one call.

A step is tested equal to the module it speeds up, which is where the mathematics stands. Weights
are packed once and read from then on: a step does not see later changes of its module.

Shapes: B batch (at most 8), D model, N heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.kernels import decode as kernel
from valkyrie_core.kernels.arena import Arena
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.attention import Attention
from valkyrie_core.nn.decode_moe import MoEStep, has_step
from valkyrie_core.nn.decode_native import Native, PackedWeights, Step, eps_of, plain
from valkyrie_core.nn.ffn import SwiGLU
from valkyrie_core.nn.kv_cache import KVState
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.position import rotation
from valkyrie_core.nn.rwkv import RWKV7, ChannelMix, TimeMixState
from valkyrie_core.nn.state import Ctx
from valkyrie_core.nn.weights import Weights


def fused(norm: nn.Module, mixer: nn.Module, weights: Weights, arena: Arena) -> Step | None:
    """The native step of a sub-layer; None if its type has none, or none for its sizes.

    Raises:
        BuildError: native code can't be had here.
    """
    if type(norm) not in (nn.LayerNorm, nn.RMSNorm) or not _is_plain(norm, mixer):
        return None
    # exact types: a subclass may compute something else
    if type(mixer) is RWKV7 and mixer.head_dim % 4 == 0:
        return TimeMixStep(norm, mixer, weights, arena)
    if type(mixer) is Attention and mixer.normalizer == "softmax" and mixer.head_dim % 4 == 0:
        return AttentionStep(norm, mixer, weights, arena)
    if type(mixer) is ChannelMix:
        return ChannelMixStep(norm, mixer, weights, arena)
    if type(mixer) is SwiGLU:
        return SwiGLUStep(norm, mixer, weights, arena)
    if type(mixer) is MoE and has_step(mixer):
        return MoEStep(norm, mixer, weights, arena)
    return None


def _is_plain(*modules: nn.Module) -> bool:
    """Whether all parameters are what native code reads."""
    parameters = [p for module in modules for p in module.parameters()]
    return all(
        p.dtype in (torch.float32, torch.bfloat16) and p.device.type == "cpu" for p in parameters
    )


class TimeMixStep(Native):
    """RWKV-7's time mix."""

    def __init__(self, norm: nn.Module, mixer: RWKV7, weights: Weights, arena: Arena) -> None:
        super().__init__(weights, arena, kernel.rwkv_library(), "time_mix")
        pack = self._pack
        self.has_residual = mixer.mixes_values
        N, H = mixer.num_heads, mixer.head_dim

        def second(factor_RD: Tensor) -> kernel.Matrix:
            # every head starts a group of rows
            per_head = factor_RD.detach().T.reshape(N, H, -1)
            return pack.matrix(F.pad(per_head, (0, 0, 0, -H % kernel.GROUP)).flatten(0, 1))

        residual = {}
        if self.has_residual:
            residual = {
                "v1": pack.matrix(mixer.v1.T),
                "v2": second(mixer.v2),
                "v0": pack.vector(mixer.v0),
            }
        mixes = (mixer.x_r, mixer.x_w, mixer.x_k, mixer.x_v, mixer.x_a, mixer.x_g)
        self._keep(
            kernel.TimeMix(
                *(N * H, N, H, self.has_residual, mixer.signed),
                norm=pack.norm(norm),
                mix=(ctypes.c_void_p * 6)(*(pack.vector(mix) for mix in mixes)),
                receptance=pack.matrix(mixer.receptance.weight),
                key=pack.matrix(mixer.key.weight),
                value=pack.matrix(mixer.value.weight),
                output=pack.matrix(mixer.output.weight),
                **{name: pack.matrix(getattr(mixer, name).T) for name in ("w1", "a1", "g1")},
                **{name: second(getattr(mixer, name)) for name in ("w2", "a2", "g2")},
                **{name: pack.vector(getattr(mixer, name)) for name in ("w0", "a0", "k_k", "k_a")},
                r_k=pack.vector(mixer.r_k),
                gain=pack.vector(mixer.ln_x_weight),
                bias=pack.vector(mixer.ln_x_bias),
                **residual,
            )
        )

    def __call__(
        self, x_BD: Tensor, state: TimeMixState, ctx: Ctx, queue: kernel.Queue
    ) -> tuple[Tensor, TimeMixState, Ctx]:
        """See `Step`."""
        last_BD, wkv_BNHH = plain(state.shift_BD), plain(state.wkv_BNHH)
        y_BD, new_last_BD = torch.empty_like(x_BD), torch.empty_like(x_BD)
        new_wkv_BNHH = torch.empty_like(wkv_BNHH)
        v_first, v_BD = ctx.v_first_BTD, None
        if v_first is None:
            v_BD = torch.empty_like(x_BD)
            ctx = ctx._replace(v_first_BTD=v_BD[:, None])
        else:
            v_first = plain(v_first)
        pointers = (
            x_BD.data_ptr(),
            last_BD.data_ptr(),
            wkv_BNHH.data_ptr(),
            0 if v_first is None else v_first.data_ptr(),
            y_BD.data_ptr(),
            new_last_BD.data_ptr(),
            new_wkv_BNHH.data_ptr(),
            0 if v_BD is None else v_BD.data_ptr(),
        )
        kept = (x_BD, last_BD, wkv_BNHH, v_first, y_BD, new_last_BD, new_wkv_BNHH, v_BD)
        queue.add(self._step, self._at, pointers, self._size(queue), *kept)
        return y_BD, TimeMixState(new_last_BD, new_wkv_BNHH), ctx


class ChannelMixStep(Native):
    """RWKV-7's channel mix."""

    def __init__(self, norm: nn.Module, mixer: ChannelMix, weights: Weights, arena: Arena) -> None:
        super().__init__(weights, arena, kernel.rwkv_library(), "channel_mix")
        hidden, dim = mixer.key.weight.shape
        self._keep(
            kernel.ChannelMix(
                *(dim, hidden),
                norm=self._pack.norm(norm),
                mix=self._pack.vector(mixer.x_k),
                key=self._pack.matrix(mixer.key.weight),
                value=self._pack.matrix(mixer.value.weight),
            )
        )

    def __call__(
        self, x_BD: Tensor, state: Tensor, ctx: Ctx, queue: kernel.Queue
    ) -> tuple[Tensor, Tensor, Ctx]:
        """See `Step`."""
        last_BD = plain(state)
        kept = (x_BD, last_BD, torch.empty_like(x_BD), torch.empty_like(x_BD))
        pointers = tuple(tensor.data_ptr() for tensor in kept)
        queue.add(self._step, self._at, pointers, self._size(queue), *kept)
        return kept[2], kept[3], ctx


class SwiGLUStep(Native):
    """SwiGLU; has no state."""

    def __init__(self, norm: nn.Module, mixer: SwiGLU, weights: Weights, arena: Arena) -> None:
        super().__init__(weights, arena, kernel.layers_library(), "swiglu")
        hidden, dim = mixer.up.weight.shape
        self._keep(
            kernel.SwiGLU(
                *(dim, hidden),
                norm=self._pack.norm(norm),
                gate=self._pack.matrix(mixer.gate.weight),
                up=self._pack.matrix(mixer.up.weight),
                down=self._pack.matrix(mixer.down.weight),
            )
        )

    def __call__(
        self, x_BD: Tensor, state: tuple[()], ctx: Ctx, queue: kernel.Queue
    ) -> tuple[Tensor, tuple[()], Ctx]:
        """See `Step`."""
        y_BD = torch.empty_like(x_BD)
        pointers = (x_BD.data_ptr(), y_BD.data_ptr())
        queue.add(self._step, self._at, pointers, self._size(queue), x_BD, y_BD)
        return y_BD, state, ctx


class AttentionStep(Native):
    """Grouped-query attention; writes into the buffers that the cache makes room in."""

    def __init__(self, norm: nn.Module, mixer: Attention, weights: Weights, arena: Arena) -> None:
        super().__init__(weights, arena, kernel.layers_library(), "attention")
        H, N, K = mixer.head_dim, mixer.num_heads, mixer.num_kv_heads
        pack = self._pack
        turning = rotation(mixer.position, H, torch.float32)
        turned = 0 if turning is None else H // 2 * 2
        frequency, scale = (torch.ones(0), 1.0) if turning is None else turning
        self._keep(
            kernel.Attention(
                *(N * H, N, K, H, turned, eps_of(mixer.query_norm)),
                norm=pack.norm(norm),
                query=pack.matrix(mixer.query.weight),
                key=pack.matrix(mixer.key.weight),
                value=pack.matrix(mixer.value.weight),
                output=pack.matrix(mixer.output.weight),
                query_norm=pack.vector(mixer.query_norm.weight),
                key_norm=pack.vector(mixer.key_norm.weight),
                frequency=pack.vector(frequency),
                turn_scale=scale,
                window=mixer.window or 0,
                sinks=mixer.sinks,
                slopes=None if mixer.slopes is None else pack.vector(torch.tensor(mixer.slopes)),
            )
        )
        self._shape = (K, 1, H)
        self._trimmed = mixer.trimmed

    def __call__(
        self, x_BD: Tensor, state: KVState, ctx: Ctx, queue: kernel.Queue
    ) -> tuple[Tensor, KVState, Ctx]:
        """See `Step`."""
        dtype = state.k_BKSH.dtype
        # takes a place in the cache as it does for the module; the native code fills it
        place = torch.zeros(queue.B, *self._shape, dtype=dtype)
        state = self._trimmed(state, ctx)
        new = kv_cache.append(state, place, place, ctx.segment_BT, ctx.pos_BT)
        cache = kernel.Cache(
            new.k_BKSH.data_ptr(),
            new.v_BKSH.data_ptr(),
            new.segment_BS.data_ptr(),
            new.pos_BS.data_ptr(),
            *(state.length, new.k_BKSH.shape[2], dtype is torch.bfloat16),
        )
        position_B, y_BD = ctx.pos_BT.contiguous(), torch.empty_like(x_BD)
        pointers = (
            x_BD.data_ptr(),
            ctypes.addressof(cache),
            position_B.data_ptr(),
            y_BD.data_ptr(),
        )
        size = self._measure(self._at, state.length, queue.B, queue.threads)
        queue.add(self._step, self._at, pointers, size, x_BD, cache, new, position_B, y_BD)
        return y_BD, new, ctx


class EmbeddingStep:
    """Embedding and the norm after it: tokens [B] in, x [B, D] out."""

    def __init__(self, model: HybridLM) -> None:
        self._call = kernel.layers_library().embed
        self._pack = PackedWeights("fp32", Arena())
        self._table_VD = plain(model.embedding.weight.detach())
        V, D = self._table_VD.shape
        self._structure = kernel.Embedding(
            D, V, self._pack.norm(model.embedding_norm), self._table_VD.data_ptr()
        )
        self._at = ctypes.addressof(self._structure)

    def __call__(self, tokens_B: Tensor) -> Tensor:
        """Raises IndexError for a token outside of the vocabulary."""
        D = self._table_VD.shape[1]
        tokens_B = tokens_B.contiguous()
        x_BD, row_D = torch.empty(tokens_B.shape[0], D), torch.empty(D + kernel.GROUP)
        wrong = self._call(
            self._at, tokens_B.data_ptr(), x_BD.data_ptr(), row_D.data_ptr(), tokens_B.shape[0]
        )
        if wrong:
            raise IndexError(f"a token is outside of the vocabulary: {tokens_B.tolist()}")
        return x_BD


class HeadStep(Native):
    """The last norm and the output layer: x [B, D] in, logits [B, V] out."""

    def __init__(self, model: HybridLM, weights: Weights, arena: Arena) -> None:
        super().__init__(weights, arena, kernel.layers_library(), "head")
        self._vocab_size, dim = model.head.weight.shape
        self._keep(
            kernel.Head(dim, self._pack.norm(model.head_norm), self._pack.matrix(model.head.weight))
        )

    def __call__(self, x_BD: Tensor, queue: kernel.Queue) -> Tensor:
        """Joins the queue; the logits are there once it has run."""
        logits_BV = torch.empty(queue.B, self._vocab_size)
        pointers = (x_BD.data_ptr(), logits_BV.data_ptr())
        queue.add(self._step, self._at, pointers, self._size(queue), x_BD, logits_BV)
        return logits_BV
