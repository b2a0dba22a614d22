"""HybridLM: embedding, core, head.

Shapes: B batch, T time, D model, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from valkyrie_core.kernels.loss import IGNORED as IGNORED
from valkyrie_core.kernels.loss import fused_serves, linear_cross_entropy
from valkyrie_core.nn.backbone import Backbone, ModelConfig, Told, tell
from valkyrie_core.nn.block import Stack
from valkyrie_core.nn.halting import Confidence
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.state import Ctx, LMState, enter

LOGITS_AT_ONCE = 1 << 22
"""Logits of a chunk of the loss: 16 MiB in fp32, whatever the vocabulary."""
Loss = Callable[..., tuple[Tensor, LMState, Any]]
"""`HybridLM.loss`, or what was compiled from it."""


class LMOutput(NamedTuple):
    """What a forward pass gives back."""

    logits_BTV: Tensor
    state: LMState
    told: Told


class HybridLM(Backbone):
    """A causal language model over blocks of any mixers.

    Weights are drawn from torch's global generator: seed it first. The state is a value: pass the
    returned one on to continue, keep the old one to fork.
    """

    core: Stack | Recursive
    _enter = staticmethod(enter)

    def __init__(self, config: ModelConfig, matrices: torch.dtype = torch.float32) -> None:
        """
        Args:
            matrices: the type that matrices are stored in; see `nn/storage_type.py`.
        """
        super().__init__(config, matrices)
        if not isinstance(self.core, Stack | Recursive):
            raise ValueError(f"the core {config.core.type} makes no language model")

    def forward(self, tokens_BT: Tensor, state: LMState, doc_BT: Tensor | None = None) -> LMOutput:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids; what stands at padding does not matter.
            state: from `init_state` or an earlier call.
            doc_BT: document ids. Position 0 continues the state's document if the id is the same,
                else it starts fresh; -1 is padding and changes nothing. None: all tokens continue
                the state's document.
        """
        x_BTD, state, ctx = self._hidden(tokens_BT, state, doc_BT)
        return LMOutput(self.head(x_BTD), state, tell(ctx))

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None = None,
    ) -> tuple[Tensor, LMState, Told]:
        """Mean cross-entropy in nats over the scored targets (-100 is not), plus auxiliary losses.

        The logits are made and consumed in chunks, never held all at once; where native code
        serves, their gradients are made with them, else the backward pass makes them again.
        """
        x_BTD, state, ctx = self._hidden(tokens_BT, state, doc_BT)
        x_RD, targets_R = x_BTD.flatten(0, 1), targets_BT.flatten()
        if fused_serves(x_RD, self.head.weight):
            nats = linear_cross_entropy(x_RD, self.head.weight, targets_R)
        else:
            nats = self._cross_entropy(x_BTD, targets_BT).sum()
        loss = nats / (targets_BT != IGNORED).sum().clamp(min=1)
        if ctx.between:
            ctx = ctx._replace(aux=(*ctx.aux, *self._between(ctx, x_BTD, targets_BT)))
        for _, value in ctx.aux:
            loss = loss + value
        return loss, state, tell(ctx)

    def _between(self, ctx: Ctx, x_BTD: Tensor, targets_BT: Tensor) -> list[tuple[str, Tensor]]:
        """Losses of what stands between loops: of the head, and of the confidence in it."""
        assert isinstance(self.core, Recursive)
        found = []
        scored_BT = targets_BT != IGNORED
        scored = scored_BT.sum().clamp(min=1)
        if self.core.loop_loss:
            nats = [
                self._cross_entropy(self.head_norm(h_BTD), targets_BT).sum()
                for h_BTD in ctx.between
            ]
            found.append(("loops", self.core.loop_loss * torch.stack(nats).mean() / scored))
        if isinstance(self.core.halting, Confidence):
            # of every token, as every one may halt: what is read is not scored, and yet looked at
            last_R = self._likeliest(x_BTD)
            real_R = 1.0 if ctx.valid_BT is None else ctx.valid_BT.flatten().to(x_BTD.dtype)
            losses = []
            for h_BTD in ctx.between:
                # it learns what more loops would say, and moves nothing but itself
                h_BTD = h_BTD.detach()
                agrees_R = self._likeliest(self.head_norm(h_BTD)) == last_R
                logits_R = self.core.halting.logits(h_BTD).flatten()
                nats_R = F.binary_cross_entropy_with_logits(
                    logits_R, agrees_R.to(logits_R.dtype), reduction="none"
                )
                losses.append((real_R * nats_R).sum())
            count = last_R.numel() if ctx.valid_BT is None else ctx.valid_BT.sum().clamp(min=1)
            found.append(("confidence", torch.stack(losses).mean() / count))
        return found

    def confidences(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor], LMState]:
        """After every loop but the last, of every scored token: the confidence [N] that it is what
        all loops would say, and whether it is.

        The core is a looped one with a learned confidence.
        """
        core = self.core
        assert isinstance(core, Recursive)
        assert isinstance(core.halting, Confidence)
        core.keeps_between = True
        try:
            x_BTD, state, ctx = self._hidden(tokens_BT, state, doc_BT)
        finally:
            core.keeps_between = False
        scored_BT = targets_BT != IGNORED
        last_R = self.head(x_BTD[scored_BT]).argmax(-1)
        loops = [h_BTD[scored_BT] for h_BTD in ctx.between]
        said_N = torch.cat([core.halting.logits(h_RD).sigmoid() for h_RD in loops])
        held_N = torch.cat([self._readout(h_RD).argmax(-1) == last_R for h_RD in loops])
        return (said_N, held_N), state

    def compiled_loss(self, mode: str) -> Loss:
        """`loss` by way of torch.compile, for one shape of window."""
        # it looks at values (is there padding?), which a compiled graph can't. Said here and not
        # beside it: saying it imports the compiler, which takes a second
        self._enter = torch.compiler.disable(enter)  # type: ignore[no-untyped-call]
        for module in self.modules():
            if isinstance(module, MoE):
                # how many tokens each expert gets is another number at every step
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]
        # static shapes: with dynamic ones the bits would depend on what was seen before
        return torch.compile(self.loss, dynamic=False, mode=mode)

    def token_losses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None = None,
    ) -> tuple[Tensor, LMState]:
        """[B, T] cross-entropy in nats of every target, 0 where it is not scored."""
        x_BTD, state, _ = self._hidden(tokens_BT, state, doc_BT)
        return self._cross_entropy(x_BTD, targets_BT).view(targets_BT.shape), state

    def misses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: LMState,
        doc_BT: Tensor | None = None,
    ) -> tuple[Tensor, LMState]:
        """[B, T] which targets are not the likeliest token; False where none is scored."""
        logits_BTV, state, _ = self(tokens_BT, state, doc_BT)
        # not finite is not right: of NaN the likeliest is the first one
        right_BT = (logits_BTV.argmax(-1) == targets_BT) & logits_BTV.isfinite().all(-1)
        return ~right_BT & (targets_BT != IGNORED), state

    def _hidden(
        self, tokens_BT: Tensor, state: LMState, doc_BT: Tensor | None
    ) -> tuple[Tensor, LMState, Ctx]:
        ctx, moved = self._enter(state, tokens_BT, doc_BT)
        x_BTD = self.embedding(tokens_BT).to(next(self.head_norm.parameters()).dtype)
        x_BTD = self.embedding_norm(x_BTD)
        if isinstance(self.core, Recursive):
            x_BTD, layers, ctx = self.core(x_BTD, state.layers, ctx, self._readout)
        else:
            x_BTD, layers, ctx = self.core(x_BTD, state.layers, ctx)
        return self.head_norm(x_BTD), moved._replace(layers=layers), ctx

    @torch.no_grad()
    def _likeliest(self, x_BTD: Tensor) -> Tensor:
        """[R] what the head says, of so many rows at a time that few logits are held."""
        rows = max(1, LOGITS_AT_ONCE // self.head.out_features)
        pieces = torch.split(x_BTD.detach().flatten(0, 1), rows)
        return torch.cat([self.head(piece_RD).argmax(-1) for piece_RD in pieces])

    def _readout(self, h_RD: Tensor) -> Tensor:
        logits_RV: Tensor = self.head(self.head_norm(h_RD))
        return logits_RV

    def _cross_entropy(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        x_RD, targets_R = x_BTD.flatten(0, 1), targets_BT.flatten()
        rows = max(1, LOGITS_AT_ONCE // self.head.out_features)
        if x_RD.shape[0] <= rows:
            return self._chunk_cross_entropy(x_RD, targets_R)
        pieces = []
        for start in range(0, x_RD.shape[0], rows):
            piece = (x_RD[start : start + rows], targets_R[start : start + rows])
            if torch.is_grad_enabled():
                # the backward pass makes the chunk's logits again
                pieces.append(checkpoint(self._chunk_cross_entropy, *piece, use_reentrant=False))
            else:
                pieces.append(self._chunk_cross_entropy(*piece))
        return torch.cat(pieces)

    def _chunk_cross_entropy(self, x_RD: Tensor, targets_R: Tensor) -> Tensor:
        logits_RV = self.head(x_RD)
        precise = torch.promote_types(logits_RV.dtype, torch.float32)
        return F.cross_entropy(
            logits_RV.to(precise), targets_R, ignore_index=IGNORED, reduction="none"
        )
