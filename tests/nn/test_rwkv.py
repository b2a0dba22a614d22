"""RWKV-7 against the numpy twin, its initialisation, and its author's checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.nn.menu import awake, hybrid_config, model_config
from tests.reference import rwkv7 as twin
from valkyrie_core.errors import CheckpointError, MissingError
from valkyrie_core.kernels.time_mix import Rows, Vectors, time_mix
from valkyrie_core.nn.layers import parameter_roles
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.rwkv import RWKV7, RWKV7Config, low_rank
from valkyrie_core.nn.rwkv_checkpoint import load_rwkv7, our_name, rwkv7_tensors


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("mixer", ["rwkv7", "rwkv7-signed"])
def test_pure_model_equals_the_numpy_twin(mixer: str, layers: int) -> None:
    model = awake(model_config(mixer, "channel_mix", layers=layers))
    weights = {n: x.numpy() for n, x in rwkv7_tensors(model).items()}
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    with torch.no_grad():
        ours = model(torch.tensor([tokens]), model.init_state(1)).logits_BTV[0].numpy()
    theirs = twin.model(tokens, weights, layers, head_dim=8, signed=mixer == "rwkv7-signed")
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("signed", [False, True])
def test_eigenvalues_reach_what_they_may_and_no_more(signed: bool) -> None:
    """Of one token's change of the state, read off the layer: S' of S = 1 without a value."""
    H, T = 8, 400
    shape = (1, T, H)
    generator = torch.Generator().manual_seed(0)

    def rows(scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    key, decay, rate = rows(1.0), rows(6.0), rows(6.0)
    nothing = torch.zeros(shape, dtype=torch.float64)
    zero, one = torch.zeros(H).double(), torch.ones(H).double()
    vectors = Vectors(zero, zero, None, one, zero, zero, one, zero)
    least, largest = 1.0, 0.0
    for t in range(T):
        here = (x[:, t : t + 1] for x in (nothing, key, nothing, decay, rate))
        own = Rows(*here, share=None, v_first=None, gate=nothing[:, :1])
        start = torch.eye(H, dtype=torch.float64)[None, None]
        change = time_mix(own, vectors, start, None, signed=signed)[1][0, 0]
        found = torch.linalg.eigvals(change)
        # similar to a symmetric matrix, so they are real
        assert float(found.imag.abs().max()) < 1e-9
        least, largest = min(least, float(found.real.min())), max(largest, float(found.real.max()))
    assert 0.99 < largest <= 1
    floor = -1 if signed else math.exp(-math.exp(-0.5)) - 1
    assert floor - 1e-9 < least < floor + (0.05 if signed else 0.25)


def test_author_checkpoint_round_trip(tmp_path: Path) -> None:
    model = awake(model_config("rwkv7", "channel_mix", layers=3)).float()
    tensors = rwkv7_tensors(model)
    assert tensors["blocks.1.att.x_r"].shape == (1, 1, 16)
    assert tensors["blocks.1.att.r_k"].shape == (2, 8)
    # some checkpoints carry these; they are never used
    tensors["blocks.0.att.v0"] = torch.zeros(1, 1, 16)
    save_file(tensors, tmp_path / "rwkv.safetensors")
    loaded = load_rwkv7(tmp_path / "rwkv.safetensors")
    assert loaded.config.core.layers == ("rwkv",) * 3
    x = torch.arange(9)[None]
    with torch.no_grad():
        a = model(x, model.init_state(1)).logits_BTV
        b = loaded(x, loaded.init_state(1)).logits_BTV
    assert torch.equal(a, b)


def test_a_bad_author_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    tensors = rwkv7_tensors(awake(model_config("rwkv7", "channel_mix")).float())
    with pytest.raises(MissingError):
        load_rwkv7(tmp_path / "none.safetensors")
    (tmp_path / "rwkv.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="safetensors") as caught:
        load_rwkv7(tmp_path / "rwkv.pth")
    assert "save_file" in (caught.value.hint or "")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        load_rwkv7(tmp_path / "bad.safetensors")
    for change, message in (
        ({"blocks.1.att.k_k": None}, "lacks"),
        ({"blocks.1.att.k_k": torch.zeros(3)}, "shape"),
        ({"blocks.1.att.other": torch.zeros(3)}, "not a parameter"),
        ({"emb.weight": None}, "not an RWKV-7 checkpoint"),
    ):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_rwkv7(tmp_path / "changed.safetensors")


def test_names_map_one_to_one() -> None:
    model = awake(model_config("rwkv7", "channel_mix", layers=2))
    theirs = list(rwkv7_tensors(model))
    assert sorted(our_name(name) or "?" for name in theirs) == sorted(
        name for name, _ in model.named_parameters()
    )
    assert our_name("blocks.0.att.x_r") == "core.layers.0.mixer.x_r"
    assert our_name("optimizer.state") is None


def test_initial_values_are_the_authors() -> None:
    torch.manual_seed(0)
    C, L, layer, H = 64, 4, 2, 16
    mix = RWKV7Config(head_dim=H).build(C, layer_idx=layer, num_layers=L)
    zigzag = np.array([((n % H) - (H - 1) / 2) / ((H - 1) / 2) for n in range(C)])
    zigzag = zigzag * np.abs(zigzag)
    linear = np.array([n / (C - 1) - 0.5 for n in range(C)])
    depth = layer / (L - 1)
    speed = np.array([-6 + 6 * (n / (C - 1)) ** (1 + depth**0.3) for n in range(C)])
    expected = {
        "w0": speed + 0.5 + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "v0": 0.73 - 0.4 * linear,
        "k_k": 0.71 - 0.1 * linear,
        "x_r": np.array([1 - (n / C) ** (0.2 * (1 - layer / L)) for n in range(C)]),
        "x_w": np.array([1 - (n / C) ** (0.9 * (1 - layer / L)) for n in range(C)]),
        "ln_x_weight": np.full(C, ((1 + layer) / L) ** 0.7),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            getattr(mix, name).detach().numpy(), values, rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert (mix.r_k == -0.04).all()
    assert (mix.output.weight == 0).all()
    eye = mix.receptance.weight @ mix.receptance.weight.T
    torch.testing.assert_close(eye, torch.eye(C), rtol=0, atol=1e-5)


def test_one_layer_has_its_own_limit() -> None:
    mix = RWKV7Config(head_dim=8).build(16, layer_idx=0, num_layers=1)
    assert all(bool(p.isfinite().all()) for p in mix.parameters())


def test_ranks_follow_the_authors_rule() -> None:
    assert [low_rank(768, f) for f in (2.5, 1.7, 5.0)] == [64, 32, 128]
    assert [low_rank(4096, f) for f in (2.5, 1.7, 5.0)] == [160, 96, 320]
    assert low_rank(32, 2.5) == 8


def test_decay_stays_in_its_range() -> None:
    assert -math.exp(-0.5) > -0.6066
    model = awake(hybrid_config("rr"))
    seen = []
    with torch.no_grad():
        for layer in model.core.layers:
            mix = layer.mixer
            assert isinstance(mix, RWKV7)
            x = torch.randn(50, 16, dtype=torch.float64) * 100
            z = mix.w0 + (x @ mix.w1).tanh() @ mix.w2
            seen.append(-math.exp(-0.5) * torch.sigmoid(z))
    assert min(float(s.min()) for s in seen) >= -0.6066


def test_parameter_roles() -> None:
    roles = parameter_roles(HybridLM(hybrid_config()))
    assert roles["embedding.weight"] == "embedding"
    assert roles["head.weight"] == "head"
    assert roles["core.layers.0.mixer.w0"] == "decay"
    assert roles["core.layers.0.mixer.w1"] == "low_rank"
    assert roles["core.layers.0.mixer.key.weight"] == "matrix"
    assert roles["core.layers.0.mixer.r_k"] == "vector"
    assert roles["core.layers.2.mixer.query_norm.weight"] == "vector"
    tied = HybridLM(hybrid_config(head="tied"))
    assert "head.weight" not in parameter_roles(tied)
    assert len(parameter_roles(tied)) == len(list(tied.parameters()))
