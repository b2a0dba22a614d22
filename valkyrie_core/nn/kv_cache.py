"""The keys and values that attention carries along time: buffers that grow, forks that copy.

Shapes: B batch, T time of the window, S time of all keys, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Keys are stored in buffers that grow by at least this many tokens."""
TRIMMED_AT_ONCE = 256
"""Keys that gather behind a window before they go: moving the others costs a copy."""
PADDING = -1
"""The segment of a padding key: no query has it."""


class HighWater:
    """How far a shared buffer is filled; a state behind the mark may not write to it."""

    def __init__(self, length: int) -> None:
        self.length = length


class KVState(NamedTuple):
    """Keys and values of the tokens so far: the first `length` places of buffers.

    The buffers may hold more than this state's own tokens: places past `length` belong to states
    that continue this one. They are only ever written past the mark, so a state stays a value.
    """

    k_BKSH: Tensor
    v_BKSH: Tensor
    segment_BS: Tensor
    pos_BS: Tensor
    """The position of every key in its document."""
    length: int
    mark: HighWater


def empty(
    batch_size: int, num_kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> KVState:
    """The cache before any token."""
    nothing = torch.empty(batch_size, num_kv_heads, 0, head_dim, device=device, dtype=dtype)
    of_token = torch.empty(batch_size, 0, device=device, dtype=torch.int64)
    return KVState(nothing, nothing, of_token, of_token, 0, HighWater(0))


def append(
    state: KVState, k_BKTH: Tensor, v_BKTH: Tensor, segment_BT: Tensor, pos_BT: Tensor
) -> KVState:
    """The cache with a window more; `state` stays as valid as it was.

    Writes in place only past the high-water mark of the shared buffers, and never under autograd.
    """
    T = k_BKTH.shape[2]
    length = state.length + T
    if torch.is_grad_enabled() and (k_BKTH.requires_grad or state.k_BKSH.requires_grad):
        if state.length:
            k_BKTH = torch.cat([state.k_BKSH[:, :, : state.length].to(k_BKTH), k_BKTH], dim=2)
            v_BKTH = torch.cat([state.v_BKSH[:, :, : state.length].to(v_BKTH), v_BKTH], dim=2)
            segment_BT = torch.cat([state.segment_BS[:, : state.length], segment_BT], dim=1)
            pos_BT = torch.cat([state.pos_BS[:, : state.length], pos_BT], dim=1)
        return KVState(k_BKTH, v_BKTH, segment_BT, pos_BT, length, HighWater(length))
    k_BKSH, v_BKSH, segment_BS, pos_BS, _, mark = state
    if length > k_BKSH.shape[2] or mark.length != state.length or k_BKSH.dtype != k_BKTH.dtype:
        # out of room, or another continuation has taken the place: move to buffers of our own
        room = -(-max(length, state.length * 3 // 2) // BLOCK) * BLOCK
        k_BKSH = _moved(k_BKSH.to(k_BKTH.dtype), state.length, room, dim=2)
        v_BKSH = _moved(v_BKSH.to(v_BKTH.dtype), state.length, room, dim=2)
        segment_BS = _moved(segment_BS, state.length, room, dim=1)
        pos_BS = _moved(pos_BS, state.length, room, dim=1)
        mark = HighWater(state.length)
    k_BKSH[:, :, state.length : length] = k_BKTH
    v_BKSH[:, :, state.length : length] = v_BKTH
    segment_BS[:, state.length : length] = segment_BT
    pos_BS[:, state.length : length] = pos_BT
    mark.length = length
    return KVState(k_BKSH, v_BKSH, segment_BS, pos_BS, length, mark)


class StoredCache(NamedTuple):
    """A cache without spare room, as it is written to a file."""

    k_BKSH: Tensor
    v_BKSH: Tensor
    segment_BS: Tensor
    pos_BS: Tensor


def stored(state: KVState) -> StoredCache:
    """The keys and values that the state sees, and no more."""
    L = state.length
    return StoredCache(
        state.k_BKSH[:, :, :L], state.v_BKSH[:, :, :L], state.segment_BS[:, :L], state.pos_BS[:, :L]
    )


def growing(state: KVState) -> list[tuple[str, Tensor, int]]:
    """The name of each part of a stored cache, a tensor of its shape, the dimension that grows."""
    parts = StoredCache(state.k_BKSH, state.v_BKSH, state.segment_BS, state.pos_BS)
    dims = (2, 2, 1, 1)
    return list(zip(StoredCache._fields, parts, dims, strict=True))


def restored(k_BKSH: Tensor, v_BKSH: Tensor, segment_BS: Tensor, pos_BS: Tensor) -> KVState:
    """The cache that was stored. ValueError where the parts are not equally long."""
    length = k_BKSH.shape[2]
    if not length == v_BKSH.shape[2] == segment_BS.shape[1] == pos_BS.shape[1]:
        raise ValueError("keys, values, segments and positions are not equally many")
    return KVState(k_BKSH, v_BKSH, segment_BS, pos_BS, length, HighWater(length))


def forget(state: KVState, segment_B: Tensor) -> KVState:
    """The cache without keys of documents that ended, so far as they come first in every row."""
    if state.length == 0:
        return state
    own_BS = state.segment_BS[:, : state.length] == segment_B[:, None]
    # a row that has no key of its document needs none
    first_B = torch.where(own_BS.any(dim=1), own_BS.byte().argmax(dim=1), state.length)
    first = int(first_B.min())
    if first == 0:
        return state
    return restored(
        *(part[:, :, first:] if part.dim() == 4 else part[:, first:] for part in stored(state))
    )


def _moved(buffer: Tensor, length: int, room: int, *, dim: int) -> Tensor:
    shape = list(buffer.shape)
    shape[dim] = room
    # zeros, not empty: a masked key must be finite, since 0 * NaN is NaN
    moved = buffer.new_zeros(shape)
    moved.narrow(dim, 0, length).copy_(buffer.narrow(dim, 0, length))
    return moved


def trim(
    state: KVState,
    segment_B: Tensor,
    pos_B: Tensor,
    window: int,
    sinks: int,
    *,
    at_once: int | None = None,
) -> KVState:
    """The cache without keys that no later query of a windowed layer sees; `state` stays valid.

    Args:
        at_once: keys go only once so many of them have gathered; None: `TRIMMED_AT_ONCE`.
        segment_B, pos_B: of the next query of each row.
        window: keys at a distance below it are seen.
        sinks: so many first keys of a document are always seen.
    """
    keep = window + sinks
    if state.length < keep + (TRIMMED_AT_ONCE if at_once is None else at_once):
        return state
    segment_BS, pos_BS = state.segment_BS[:, : state.length], state.pos_BS[:, : state.length]
    # where the row begins with padding, pos is that of the last real token: one key more, no less
    near_BS = (pos_BS > pos_B[:, None] - window) | (pos_BS < sinks)
    needed_BS = near_BS & (segment_BS == segment_B[:, None])
    # stable: keys stay in the order of time, the needed ones last; each row has its own
    order_BS = needed_BS.byte().argsort(dim=1, stable=True)[:, -keep:]
    B, K, _, H = state.k_BKSH.shape
    index_BKSH = order_BS[:, None, :, None].expand(B, K, keep, H)
    return KVState(
        state.k_BKSH.gather(2, index_BKSH),
        state.v_BKSH.gather(2, index_BKSH),
        segment_BS.gather(1, order_BS),
        pos_BS.gather(1, order_BS),
        keep,
        HighWater(keep),
    )
