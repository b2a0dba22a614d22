"""Messages between chunks: equal to a walk from token to token that knows of no window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from valkyrie_core.nn.state import Ctx
from valkyrie_core.nn.structure import Structure, StructureConfig

DIM = 12


def built(*, chunk_len: int, rounds: int) -> Structure:
    torch.manual_seed(0)
    config = StructureConfig(chunk_len=chunk_len, num_heads=3, rounds=rounds)
    mixer = config.build(DIM, layer_idx=0, num_layers=1).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def normed(x_TNH: Tensor, weight_H: Tensor) -> Tensor:
    eps = torch.finfo(x_TNH.dtype).eps
    return x_TNH * (x_TNH.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_H


def walked(mixer: Structure, x_TD: Tensor) -> Tensor:
    """[T, D] for one document."""
    chunk, N, H = mixer.chunk_len, mixer.num_heads, mixer.head_dim
    whole = len(x_TD) // chunk
    node_GD = x_TD[: whole * chunk].unflatten(0, (whole, chunk)).mean(1)
    for norm, messages in zip(mixer.norms, mixer.each, strict=True):
        h_GD = normed(node_GD, norm.weight)
        q, k, v = (
            layer(h_GD).view(-1, N, H) for layer in (messages.query, messages.key, messages.value)
        )
        q, k = normed(q, messages.query_norm.weight), normed(k, messages.key_norm.weight)
        rows = []
        for g in range(whole):
            p_SN = (torch.einsum("nh,snh->sn", q[g], k[: g + 1]) / H**0.5).softmax(0)
            rows.append(torch.einsum("sn,snh->nh", p_SN, v[: g + 1]).flatten())
        node_GD = node_GD + messages.output(torch.stack(rows)) if rows else node_GD
    k = normed(mixer.key(node_GD).view(-1, N, H), mixer.key_norm.weight)
    v = mixer.value(node_GD).view(-1, N, H)
    nothing = torch.zeros(1, N, H, dtype=x_TD.dtype)
    q = normed(mixer.query(x_TD).view(-1, N, H), mixer.query_norm.weight)
    out = []
    for t in range(len(x_TD)):
        known = (t + 1) // chunk
        k_SNH, v_SNH = torch.cat([nothing, k[:known]]), torch.cat([nothing, v[:known]])
        p_SN = (torch.einsum("nh,snh->sn", q[t], k_SNH) / H**0.5).softmax(0)
        out.append(torch.einsum("sn,snh->nh", p_SN, v_SNH).flatten())
    return mixer.output(torch.stack(out))


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("chunk_len", [2, 5, 40])
def test_it_is_the_walk(chunk_len: int, rounds: int) -> None:
    mixer = built(chunk_len=chunk_len, rounds=rounds)
    x_BTD = torch.randn(2, 23, DIM, dtype=torch.float64)
    pos_BT = torch.arange(23).expand(2, 23)
    state = mixer.init_state(2, device=torch.device("cpu"), dtype=torch.float64)
    y_BTD, _, _ = mixer(x_BTD, state, Ctx(pos_BT, torch.zeros_like(pos_BT)))
    for row in range(2):
        torch.testing.assert_close(y_BTD[row], walked(mixer, x_BTD[row]))
    # before the first chunk is complete there is nothing to read
    assert (y_BTD[:, : chunk_len - 1] == 0).all()


def test_its_state_grows_by_the_chunk() -> None:
    mixer = built(chunk_len=4, rounds=2)
    state = mixer.init_state(1, device=torch.device("cpu"), dtype=torch.float64)
    for t in range(17):
        pos = torch.tensor([[t]])
        x = torch.randn(1, 1, DIM, dtype=torch.float64)
        with torch.no_grad():
            _, state, _ = mixer(x, state, Ctx(pos, torch.zeros_like(pos)))
        _, _, passed, known = state
        assert known.length == (t + 1) // 4
        assert [own.length for own in passed] == [known.length] * 2
