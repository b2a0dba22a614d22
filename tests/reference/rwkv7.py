"""A numpy twin of RWKV-7, written from the paper's formulas; the project never imports it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def wkv7(
    r: Array, log_decay: Array, k: Array, v: Array, a: Array, b: Array, state: Array
) -> tuple[Array, Array]:
    """One sequence, one head: inputs [T, H], state [value, key]."""
    S = state.copy()
    ys = []
    for t in range(r.shape[0]):
        S = S @ (np.diag(np.exp(log_decay[t])) + np.outer(a[t], b[t])) + np.outer(v[t], k[t])
        ys.append(S @ r[t])
    return np.stack(ys), S


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + eps) * weight + bias


def time_mix(
    x: Array, w: dict[str, Array], head_dim: int, v_first: Array | None, *, signed: bool = False
) -> tuple[Array, Array]:
    """One sequence [T, C] through a time mix; `w` holds the author's names."""
    _, C = x.shape
    shifted = np.concatenate([np.zeros((1, C)), x[:-1]])
    xr, xw, xk, xv, xa, xg = (
        x + (shifted - x) * w[name] for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
    )
    r = xr @ w["receptance.weight"].T
    k = xk @ w["key.weight"].T
    v = xv @ w["value.weight"].T
    z = w["w0"] + np.tanh(xw @ w["w1"]) @ w["w2"]
    log_decay = -np.exp(-np.log1p(np.exp(-z)) - 0.5)
    a = sigmoid(w["a0"] + xa @ w["a1"] @ w["a2"])
    g = sigmoid(xg @ w["g1"]) @ w["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(w["v0"] + xv @ w["v1"] @ w["v2"])
    heads = []
    weight, bias = w["ln_x.weight"], w["ln_x.bias"]
    for n in range(C // head_dim):
        h = slice(n * head_dim, (n + 1) * head_dim)
        kk = k[:, h] * w["k_k"][h]
        kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
        kh = k[:, h] * (1 + (a[:, h] - 1) * w["k_a"][h])
        removed = kk * a[:, h]
        if signed:
            removed = removed * (1 + np.exp(log_decay[:, h]))
        y, _ = wkv7(r[:, h], log_decay[:, h], kh, v[:, h], -kk, removed, np.zeros((head_dim,) * 2))
        y = layer_norm(y, weight[h], bias[h], 64e-5)
        heads.append(y + (r[:, h] * kh * w["r_k"][n]).sum(-1, keepdims=True) * v[:, h])
    return (np.concatenate(heads, axis=-1) * g) @ w["output.weight"].T, v_first


def channel_mix(x: Array, w: dict[str, Array]) -> Array:
    shifted = np.concatenate([np.zeros((1, x.shape[1])), x[:-1]])
    hidden = (x + (shifted - x) * w["x_k"]) @ w["key.weight"].T
    return np.maximum(hidden, 0) ** 2 @ w["value.weight"].T


def model(
    tokens: list[int], w: dict[str, Array], layers: int, head_dim: int, *, signed: bool = False
) -> Array:
    """Logits [T, V] of a whole model; `w` is a checkpoint by the author's full names."""

    def part(prefix: str) -> dict[str, Array]:
        return {
            n.removeprefix(prefix): x.squeeze() if x.ndim == 3 else x
            for n, x in w.items()
            if n.startswith(prefix)
        }

    def norm(x: Array, name: str) -> Array:
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = norm(w["emb.weight"][tokens], "blocks.0.ln0")
    v_first: Array | None = None
    for i in range(layers):
        y, v_first = time_mix(
            norm(x, f"blocks.{i}.ln1"),
            part(f"blocks.{i}.att."),
            head_dim,
            v_first,
            signed=signed,
        )
        x = x + y
        x = x + channel_mix(norm(x, f"blocks.{i}.ln2"), part(f"blocks.{i}.ffn."))
    return norm(x, "ln_out") @ w["head.weight"].T
