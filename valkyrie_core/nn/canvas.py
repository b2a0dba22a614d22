"""Canvas: a question in, its whole answer out, improved from step to step.

Cell i holds token i of the question, and the model says token i of the answer there. What an answer
is likely to be is a product over its tokens, given the question: as exact as a language model's,
though no token is told what the others are.

Shapes: B batch, T time, C cells, M the memory and the cells, D model, V vocabulary, A answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valkyrie_core.kernels.loss import IGNORED
from valkyrie_core.nn.attention import Attention
from valkyrie_core.nn.backbone import Backbone, ModelConfig, Told, tell
from valkyrie_core.nn.canvas_core import CanvasCore, Carry
from valkyrie_core.nn.layers import Role
from valkyrie_core.nn.state import Cost, Ctx, LMState

EMPTY = 0
"""The token of a cell that the question does not reach; no tokenizer makes it."""
HALT, CONTINUE = 0, 1
"""Columns of the q-head."""


class CanvasOutput(NamedTuple):
    """What a step of supervision gives."""

    logits_BCV: Tensor
    q_BQ: Tensor
    """Logits: that the answer is right, and, with q_learning, of what going on is worth."""
    carry: Carry
    """Where the next step goes on; no gradient goes through it."""
    told: Told


class CanvasLoss(NamedTuple):
    """The loss of a step of supervision, and what it is made of."""

    loss: Tensor
    """Nats per scored token, the halting loss and the auxiliary ones: what is minimised."""
    nats_B: Tensor
    """Summed over each answer."""
    right_B: Tensor
    """Whether each whole answer is right."""
    q_BQ: Tensor
    halting: Tensor
    """The weighted loss of the q-head, as it is added."""
    carry: Carry
    told: Told


class Canvas(Backbone):
    """An answer canvas over blocks of any mixers.

    The carry is a value: pass the returned one on to think further.
    """

    core: CanvasCore

    def __init__(self, config: ModelConfig, matrices: torch.dtype = torch.float32) -> None:
        """
        Args:
            matrices: the type that matrices are stored in; see `nn/storage_type.py`.
        """
        super().__init__(config, matrices)
        if not isinstance(self.core, CanvasCore):
            raise ValueError(f"the core {config.core.type} makes no canvas")
        own, D = self.core.config, config.dim
        self.place = nn.Embedding(own.cells, D)
        nn.init.uniform_(self.place.weight, -1e-4, 1e-4)
        self.memory_MD = nn.Parameter(torch.randn(own.memory_tokens, D))
        self.max_steps = own.halt_max_steps
        """Steps of supervision, at most."""
        self.q_head = QHead(D, 2 if own.halting.type == "q_learning" else 1, own.halting.bias)

    @property
    def cells(self) -> int:
        """The longest question or answer, its end included, in tokens."""
        return self.core.config.cells

    def begin(self, batch_size: int) -> Carry:
        """The carry before the first step."""
        return self.core.begin(batch_size, len(self.memory_MD) + self.cells)

    def forward(self, tokens_BC: Tensor, carry: Carry) -> CanvasOutput:
        """One step of supervision.

        Args:
            tokens_BC: the questions, EMPTY where they don't reach.
            carry: from `begin` or an earlier step.
        """
        B, C = tokens_BC.shape
        if self.cells != C:
            raise ValueError(f"a canvas of {self.cells} cells does not go with {C} tokens")
        M = len(self.memory_MD)
        stream = next(self.head_norm.parameters()).dtype
        x_BCD = self.embedding(tokens_BC).to(stream) + self.place.weight.to(stream)
        x_BMD = torch.cat([self.memory_MD.expand(B, M, -1), self.embedding_norm(x_BCD)], dim=1)
        places_M = torch.arange(M + C, device=tokens_BC.device)
        pos_BM = places_M.expand(B, M + C)
        ctx = Ctx(pos_BT=pos_BM, segment_BT=torch.zeros_like(pos_BM), causal=False)
        carry, ctx = self.core(x_BMD, carry, ctx)
        h_BMD = self.head_norm(carry.z_H_BMD)
        q_BQ = self.q_head(h_BMD[:, 0])
        detached = Carry(carry.z_H_BMD.detach(), carry.z_L_BMD.detach())
        return CanvasOutput(self.head(h_BMD[:, M:]), q_BQ, detached, tell(ctx))

    def loss(
        self, tokens_BC: Tensor, targets_BC: Tensor, carry: Carry, last_B: Tensor
    ) -> CanvasLoss:
        """The loss of one step of supervision; every question counts alike.

        Args:
            targets_BC: the answers, -100 where there is none.
            last_B: whether this is a question's last step, whatever is said: q_learning asks.
        """
        out = self(tokens_BC, carry)
        nats_BC = self.cross_entropy(out.logits_BCV, targets_BC)
        scored_BC = targets_BC != IGNORED
        right_B = ((out.logits_BCV.argmax(-1) == targets_BC) | ~scored_BC).all(1)
        loss = (nats_BC.sum(1) / scored_BC.sum(1).clamp(min=1)).mean()
        own = self.core.config.halting
        halting = _bce(out.q_BQ[:, HALT], right_B.to(out.q_BQ.dtype))
        if own.type == "q_learning":
            with torch.no_grad():
                next_BQ = self(tokens_BC, out.carry).q_BQ
                # in its last step a question can only halt
                best_B = torch.where(last_B, next_BQ[:, HALT], next_BQ.amax(1))
            halting = halting + _bce(out.q_BQ[:, CONTINUE], best_B.sigmoid())
        halting = own.weight * halting
        loss = loss + halting
        for value in out.told.aux.values():
            loss = loss + value
        return CanvasLoss(
            loss, nats_BC.detach().sum(1), right_B, out.q_BQ.detach(), halting, out.carry, out.told
        )

    def halts(self, q_BQ: Tensor) -> Tensor:
        """Which questions the q-head would end, as in training."""
        if q_BQ.shape[1] == 1:
            return q_BQ[:, HALT] > 0
        return q_BQ[:, HALT] > q_BQ[:, CONTINUE]

    def cross_entropy(self, logits_BCV: Tensor, targets_BC: Tensor) -> Tensor:
        """Nats [B, C] of every target, 0 where there is none."""
        # a product over cells of very sure answers: fp32 can't tell the last ones from 1
        logits_BCV = logits_BCV.double()
        if self.core.config.normalizer == "stablemax":
            logits_BCV = torch.where(
                logits_BCV >= 0, logits_BCV.clamp(min=0) + 1, 1 / (1 - logits_BCV.clamp(max=0))
            ).log()
        nats_BC = F.cross_entropy(
            logits_BCV.flatten(0, 1), targets_BC.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return nats_BC.view(targets_BC.shape).to(next(self.head_norm.parameters()).dtype)

    def steps(self, tokens_BC: Tensor, max_steps: int | None = None) -> Iterator[CanvasOutput]:
        """Steps of supervision, one after the other, of all questions."""
        carry = self.begin(len(tokens_BC))
        for _ in range(max_steps or self.max_steps):
            out = self(tokens_BC, carry)
            carry = out.carry
            yield out

    def costs(self, context_len: int, value_bytes: int = 4) -> list[tuple[str, Cost]]:
        """What every mixer of every pass of a step costs per cell, with its type.

        The memory's share is in it, passes without gradients are not counted three times, and
        what is decoded is an answer after all steps.
        """
        width = len(self.memory_MD) + self.cells
        share = width / self.cells
        untrained = len(self.core.passes) - self.core.trained_passes
        found: list[tuple[str, Cost]] = []
        whole: list[tuple[str, Cost]] = []
        for index, block in zip(self.core.passes, self.blocks(), strict=True):
            # what is causal sees as many of a context that is twice as long
            own, ffn = block.costs(2 * width - 1, value_bytes)
            if isinstance(block.mixer, Attention):
                own = block.mixer.cost(width, value_bytes, causal=False)
            whole += zip(self.core.types[index], (own, ffn), strict=True)
        for number, (kind, cost) in enumerate(whole):
            forward = cost.flops_per_token
            training = forward if number // 2 < untrained else cost.training_flops
            answer = self.max_steps * forward
            found.append(
                (kind, Cost(int(share * forward), int(share * training), int(share * answer), 0))
            )
        return found

    @property
    def own_parameters(self) -> int:
        """Parameters of the cells' places, the memory and the q-head."""
        parts = (self.place.weight, self.memory_MD, *self.q_head.parameters())
        return sum(parameter.numel() for parameter in parts)

    @property
    def training_flops(self) -> int:
        """Of a step of supervision, per cell."""
        head, costs = 2 * self.head.weight.numel(), self.costs(self.cells)
        total = 3 * head + sum(cost.training_flops for _, cost in costs)
        if self.core.config.halting.type == "q_learning":
            # it looks one step ahead
            total += head + sum(cost.flops_per_token for _, cost in costs)
        return total

    def init_state(self, batch_size: int) -> LMState:
        """Of no layer: a document is read at once."""
        weight = next(self.head_norm.parameters())
        counter = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return LMState((), counter, counter, counter)

    def token_losses(
        self, tokens_BT: Tensor, targets_BT: Tensor, state: LMState, doc_BT: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        """[B, T] nats of every target after all steps, 0 where it is not scored.

        Rows are whole documents of one question, laid out as for a language model.
        """
        tokens_BC, targets_BC = self.laid_out(tokens_BT, targets_BT)
        *_, out = self.steps(tokens_BC)
        nats_BC = self.cross_entropy(out.logits_BCV, targets_BC)
        return _back(nats_BC, targets_BC, targets_BT), state

    def misses(
        self, tokens_BT: Tensor, targets_BT: Tensor, state: LMState, doc_BT: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        """[B, T] which targets are not what the model says after all steps; rows as above."""
        tokens_BC, targets_BC = self.laid_out(tokens_BT, targets_BT)
        *_, out = self.steps(tokens_BC)
        right_BC = (out.logits_BCV.argmax(-1) == targets_BC) & out.logits_BCV.isfinite().all(-1)
        return _back(~right_BC, targets_BC, targets_BT), state

    def laid_out(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Questions and answers [B, C] of documents: what stands before the first scored token
        but for the marker, and the scored tokens."""
        B, C = len(tokens_BT), self.cells
        tokens_BC = torch.full((B, C), EMPTY, dtype=torch.int64, device=tokens_BT.device)
        targets_BC = torch.full_like(tokens_BC, IGNORED)
        for row in range(B):
            places_A = (targets_BT[row] != IGNORED).nonzero().flatten()
            if not len(places_A):
                continue
            question_T = tokens_BT[row, 1 : int(places_A[0]) + 1]
            if max(len(question_T), len(places_A)) > C:
                raise ValueError(f"a canvas of {C} cells has no room for a document")
            tokens_BC[row, : len(question_T)] = question_T
            targets_BC[row, : len(places_A)] = targets_BT[row, places_A]
        return tokens_BC, targets_BC


class QHead(nn.Linear):
    """Zero weights and a bias far below zero: see `QHeadConfig`."""

    roles: ClassVar[dict[str, Role]] = {"weight": "vector"}

    def __init__(self, dim: int, values: int, bias: float) -> None:
        super().__init__(dim, values)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, bias)


def _bce(logits_B: Tensor, target_B: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_B, target_B)


def _back(value_BC: Tensor, targets_BC: Tensor, targets_BT: Tensor) -> Tensor:
    """What the cells have, at the answers' places in their documents."""
    value_BT = torch.zeros(targets_BT.shape, dtype=value_BC.dtype, device=value_BC.device)
    value_BT[targets_BT != IGNORED] = value_BC[targets_BC != IGNORED]
    return value_BT
