"""RWKV-7 checkpoints by their author's parameter names, to and from a pure RWKV-7 HybridLM.

| author's name | ours |
|---|---|
| `emb.weight` | `embedding.weight` |
| `blocks.0.ln0.*` | `embedding_norm.*` |
| `blocks.i.ln1.*`, `blocks.i.ln2.*` | `core.layers.i.mixer_norm.*`, `core.layers.i.ffn_norm.*` |
| `blocks.i.att.*` | `core.layers.i.mixer.*` (same names; x_r and its like lose two axes of 1) |
| `blocks.i.att.ln_x.weight`, `.bias` | `core.layers.i.mixer.ln_x_weight`, `ln_x_bias` |
| `blocks.i.ffn.*` | `core.layers.i.ffn.*` |
| `ln_out.*` | `head_norm.*` |
| `head.weight` | `head.weight` |

`blocks.0.att.v0`, `v1` and `v2` exist in some checkpoints and are never used: they are left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from valkyrie_core.errors import CheckpointError, MissingError
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM

_UNUSED = re.compile(r"blocks\.0\.att\.v[012]")
_RULES = (
    (re.compile(r"emb\.(.*)"), r"embedding.\1"),
    (re.compile(r"blocks\.0\.ln0\.(.*)"), r"embedding_norm.\1"),
    (re.compile(r"blocks\.(\d+)\.ln1\.(.*)"), r"core.layers.\1.mixer_norm.\2"),
    (re.compile(r"blocks\.(\d+)\.ln2\.(.*)"), r"core.layers.\1.ffn_norm.\2"),
    (re.compile(r"blocks\.(\d+)\.att\.ln_x\.(.*)"), r"core.layers.\1.mixer.ln_x_\2"),
    (re.compile(r"blocks\.(\d+)\.att\.(.*)"), r"core.layers.\1.mixer.\2"),
    (re.compile(r"blocks\.(\d+)\.ffn\.(.*)"), r"core.layers.\1.ffn.\2"),
    (re.compile(r"ln_out\.(.*)"), r"head_norm.\1"),
    (re.compile(r"(head\..*)"), r"\1"),
)


def our_name(name: str) -> str | None:
    """Our name of an author's parameter; None if it is not one of RWKV-7's."""
    for pattern, ours in _RULES:
        if match := pattern.fullmatch(name):
            return match.expand(ours)
    return None


def config_of(tensors: dict[str, Tensor]) -> ModelConfig:
    """The configuration that an author's checkpoint was made with, read off its shapes."""
    try:
        vocab_size, dim = tensors["emb.weight"].shape
        head_dim = tensors["blocks.0.att.r_k"].shape[-1]
        hidden_dim = tensors["blocks.0.ffn.key.weight"].shape[0]
        layers = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks."))
        ranks = {
            key: tensors[name].shape[1]
            for key, name in (
                ("decay_rank", "blocks.0.att.w1"),
                ("rate_rank", "blocks.0.att.a1"),
                ("gate_rank", "blocks.0.att.g1"),
            )
        }
        if layers > 1:
            ranks["value_rank"] = tensors["blocks.1.att.v1"].shape[1]
    except KeyError as error:
        raise CheckpointError(f"not an RWKV-7 checkpoint: {error.args[0]} is missing") from None
    block = {
        "mixer": {"type": "rwkv7", "head_dim": head_dim, **ranks},
        "ffn": {"type": "channel_mix", "hidden_dim": hidden_dim},
    }
    blocks = {"rwkv": block}
    core = {"type": "stack", "blocks": blocks, "pattern": ["rwkv"], "repeat": layers}
    return ModelConfig.model_validate({"vocab_size": vocab_size, "dim": dim, "core": core})


def load_rwkv7(path: Path) -> HybridLM:
    """A pure RWKV-7 model from an author's checkpoint in safetensors form.

    Raises:
        MissingError: no such file.
        CheckpointError: a pickle (.pth), a damaged file, or other parameters than RWKV-7's.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such file")
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: only safetensors are read; a {path.suffix or 'pickle'} file can run code",
            hint="convert it where you trust it: safetensors.torch.save_file("
            "torch.load(FILE, weights_only=True), 'model.safetensors')",
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    model = HybridLM(config_of(tensors))
    load_rwkv7_tensors(model, tensors)
    return model


def load_rwkv7_tensors(model: HybridLM, tensors: dict[str, Tensor]) -> None:
    """Copies an author's tensors into a model of the same shape.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape; nothing is copied.
    """
    targets = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _UNUSED.fullmatch(name):
            continue
        ours = our_name(name)
        if ours is None or ours not in targets:
            raise CheckpointError(f"{name} is not a parameter of this RWKV-7 model")
        if tensor.numel() != targets[ours].numel():
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}, {ours} {list(targets[ours].shape)}"
            )
        found[ours] = tensor.reshape(targets[ours].shape)
    if missing := sorted(set(targets) - set(found)):
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing[:3])}")
    for name, tensor in found.items():
        targets[name].data.copy_(tensor)


def rwkv7_tensors(model: HybridLM) -> dict[str, Tensor]:
    """The weights of a pure RWKV-7 model by the author's names and shapes.

    They don't tell of signed eigenvalues: others would compute with positive ones.
    """
    renamed: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        theirs = _their_name(name)
        tensor = parameter.detach()
        if tensor.dim() == 1 and ".att." in theirs and ".ln_x." not in theirs:
            tensor = tensor[None, None]
        if theirs.endswith(".ffn.x_k"):
            tensor = tensor[None, None]
        renamed[theirs] = tensor.clone()
    return renamed


def _their_name(name: str) -> str:
    layer = re.fullmatch(r"core\.layers\.(\d+)\.(mixer_norm|ffn_norm|mixer|ffn)\.(.*)", name)
    if layer:
        index, part, rest = layer.groups()
        theirs = {"mixer_norm": "ln1", "ffn_norm": "ln2", "mixer": "att", "ffn": "ffn"}[part]
        return f"blocks.{index}.{theirs}.{rest.replace('ln_x_', 'ln_x.')}"
    for ours, theirs in (
        ("embedding_norm.", "blocks.0.ln0."),
        ("embedding.", "emb."),
        ("head_norm.", "ln_out."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
