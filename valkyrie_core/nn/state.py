"""The values that move: State along time, Ctx along depth. Nothing here is ever mutated.

Shapes: B batch, T time, D model; R = B * T tokens, E experts, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from valkyrie_core.kernels.shift_mix import NOTHING, shift_mix

NO_DOCUMENT = -2
"""The document id of a state that has seen nothing (-1 is padding)."""

Value = TypeVar("Value")


class LMState(NamedTuple):
    """Everything a model carries from one token to the next; keeping an old one is a fork."""

    layers: tuple[Any, ...]
    """One (token mixer state, channel mixer state) per layer."""
    doc_B: Tensor
    """The id of each row's present document."""
    pos_B: Tensor
    """How many tokens of it have been read."""
    segment_B: Tensor
    """How many documents have been started; tells equal ids apart that are not contiguous."""


class Routed(NamedTuple):
    """What one router did with the tokens of a window; no gradient goes through it."""

    load_E: Tensor
    """Real tokens by expert."""
    logits_RE: Tensor
    """Of every token, padding included."""
    experts_RK: Tensor
    """The experts of every token, the best one first."""
    used_RK: Tensor | None
    """Which of them it really meets; None: all."""


class Route(NamedTuple):
    """Which of several mixers the tokens of a window went through; no gradient goes through it."""

    gates_BTM: Tensor
    """How much each counted."""
    used_BTM: Tensor
    """Which of them ran for the token."""
    shares_M: Tensor
    """The share of the real tokens that each of them ran for."""


class Ctx(NamedTuple):
    """What the layers of one forward pass share, deeper layers seeing what earlier ones added."""

    pos_BT: Tensor
    """The position of each token in its document."""
    segment_BT: Tensor
    """Tokens see each other only where this is equal."""
    doc_BT: Tensor | None = None
    """Document ids; None: no boundary and no padding in this window."""
    fresh_BT: Tensor | None = None
    """Which tokens start a document; None as above."""
    packed: bool = False
    """Whether a boundary or padding lies inside the window: else plain causal masks serve."""
    valid_BT: Tensor | None = None
    """Which tokens are no padding; None: all."""
    latest_BT: Tensor | None = None
    """1 + the index of the last real token before each position (0: the state's); with padding."""
    v_first_BTD: Tensor | None = None
    """The values of the first RWKV-7 layer."""
    recurred_BTD: Tensor | None = None
    """What the mixer of the latest recurrent layer made, where layers hear each other."""
    attended_BTD: Tensor | None = None
    """What that of the latest layer of attention made."""
    aux: tuple[tuple[str, Tensor], ...] = ()
    """Auxiliary losses so far, already weighted; a name comes once for every layer that has one."""
    routed: tuple[Routed, ...] = ()
    """What the routers did, first layer first; a layer that is looped comes as often."""
    routes: tuple[Route, ...] = ()
    """What routers among mixers did, first layer first."""
    between: tuple[Tensor, ...] = ()
    """[B, T, D] after each loop but the last, where a loss is asked of them."""
    loops_BT: Tensor | None = None
    """How many loops each token ran through, where tokens halt."""
    sure_BT: Tensor | None = None
    """Which tokens routers send through their cheapest mixer; None: none."""
    gaps: bool = False
    """Whether tokens between these may be missing: a cache has fewer keys than positions then."""
    causal: bool = True
    """Whether a token sees earlier ones alone; on a canvas attention sees all."""

    @property
    def first_BT(self) -> Tensor:
        """Which tokens start a document; where nothing is told of boundaries one may still begin
        with the window."""
        return self.pos_BT == 0 if self.fresh_BT is None else self.fresh_BT


class Cost(NamedTuple):
    """What a mixer costs, by formula: matrix products and recurrences, nothing elementwise."""

    flops_per_token: int
    """Forward operations per token, averaged over a causal context from its beginning."""
    training_flops: int
    """Forward and backward operations per token; what the backward pass makes again counts."""
    decode_flops: int
    """Forward operations of the context's last token, all others read before."""
    state_bytes: int
    """What is remembered of one sequence after the context."""


class Mixer(Protocol):
    """A token or channel mixer: x [B, T, D] in, y [B, T, D] out, values all through."""

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        """The state before any token."""
        ...

    def __call__(self, x_BTD: Tensor, state: Any, ctx: Ctx) -> tuple[Tensor, Any, Ctx]:
        """Mixes one window of tokens."""
        ...

    def cost(self, context_len: int, value_bytes: int = 4) -> Cost:
        """What a context of so many tokens costs, where activations take so many bytes each."""
        ...


def map_tensors(change: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Applies `change` to every tensor of a nested tuple; other leaves stay."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        items = (map_tensors(change, item) for item in value)
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    return value


def detach(state: Value) -> Value:
    """The same state without its autograd history."""
    return map_tensors(Tensor.detach, state)


def num_bytes(state: Any) -> int:
    """Bytes of memory that the tensors of a state hold."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, tuple):
        return sum(num_bytes(item) for item in state)
    return 0


def enter(state: LMState, tokens_BT: Tensor, doc_BT: Tensor | None) -> tuple[Ctx, LMState]:
    """The context of a window, and the state with its counters moved past it.

    Position 0 continues the state's document where the id is the same, else it starts fresh.

    Raises:
        ValueError: no token, or the state or the documents have other rows than the tokens.
    """
    B, T = tokens_BT.shape
    if T == 0:
        raise ValueError("a window has at least one token")
    if state.pos_B.shape != (B,):
        raise ValueError(f"a state of {len(state.pos_B)} rows does not go with {B} rows of tokens")
    if doc_BT is not None and doc_BT.shape != tokens_BT.shape:
        raise ValueError(f"doc_BT is {list(doc_BT.shape)}, the tokens {list(tokens_BT.shape)}")
    steps_T = torch.arange(T, device=tokens_BT.device)
    if doc_BT is None:
        ctx = Ctx(
            pos_BT=state.pos_B[:, None] + steps_T, segment_BT=state.segment_B[:, None].expand(B, T)
        )
        return ctx, state._replace(pos_B=state.pos_B + T)
    valid_BT = doc_BT >= 0
    padded = not bool(valid_BT.all())
    latest_BT = torch.where(valid_BT, steps_T, -1).cummax(dim=1).values
    own_BT = doc_BT.gather(1, latest_BT.clamp(min=0))
    filled_BT = torch.where(latest_BT >= 0, own_BT, state.doc_B[:, None])
    before_BT = torch.cat([state.doc_B[:, None], filled_BT[:, :-1]], dim=1)
    fresh_BT = valid_BT & (filled_BT != before_BT)
    count_BT = valid_BT.cumsum(1)
    base_BT = torch.where(fresh_BT, count_BT - 1, -state.pos_B[:, None]).cummax(dim=1).values
    pos_BT = count_BT - 1 - base_BT
    segment_BT = state.segment_B[:, None] + fresh_BT.cumsum(1)
    ctx = Ctx(
        pos_BT=pos_BT.clamp(min=0),
        segment_BT=segment_BT,
        doc_BT=doc_BT,
        fresh_BT=fresh_BT,
        packed=padded or bool(fresh_BT[:, 1:].any()),
        valid_BT=valid_BT if padded else None,
        latest_BT=torch.nn.functional.pad(latest_BT[:, :-1] + 1, (1, 0)) if padded else None,
    )
    moved = state._replace(
        doc_B=filled_BT[:, -1], pos_B=pos_BT[:, -1] + 1, segment_B=segment_BT[:, -1]
    )
    return ctx, moved


def shift(
    x_BTD: Tensor, last_BD: Tensor, ctx: Ctx, mixes: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """x + (before - x) * mix for every mix, `before` the previous token of the same document.

    Before a document's first token there are zeros. Also returns the last real token, which the
    next window continues from.
    """
    B, T, _ = x_BTD.shape
    last_BD = last_BD.to(x_BTD.dtype)
    if ctx.latest_BT is None or ctx.valid_BT is None:
        before_T = torch.arange(-1, T - 1, dtype=torch.int32, device=x_BTD.device)
        # a copy: a view would keep the whole window alive with the state
        source_BT, new_last_BD = before_T.expand(B, T), x_BTD[:, -1].clone()
    else:
        source_BT = (ctx.latest_BT - 1).int()
        end_B = torch.where(ctx.valid_BT[:, -1], T, ctx.latest_BT[:, -1])
        rows_B = torch.arange(B, device=x_BTD.device)
        new_last_BD = torch.cat([last_BD[:, None], x_BTD], dim=1)[rows_B, end_B]
    if ctx.fresh_BT is not None:
        source_BT = source_BT.masked_fill(ctx.fresh_BT, NOTHING)
    return shift_mix(x_BTD, last_BD, source_BT, mixes), new_last_BD
