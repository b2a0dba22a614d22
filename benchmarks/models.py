"""The models that are compared: ours, and their peers' with as many parameters.

Two sizes. 12M: dim 320, 8 layers, 8192 tokens. 50M: dim 512, 12 layers, 24576 tokens. The head is
the embedding's matrix in both. Hidden widths are chosen so that every model of a size has the same
number of parameters within 2 %; a test counts them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM


class Size(NamedTuple):
    """What all models of one size share, and their hidden widths."""

    name: str
    dim: int
    layers: int
    vocab_size: int
    swiglu: int
    """Of attention blocks, ours and Llama's."""
    channel_mix: int
    """Of RWKV-7 blocks, which spend more on their token mixer."""

    @property
    def num_heads(self) -> int:
        """Heads of 64."""
        return self.dim // 64


M12 = Size("12M", 320, 8, 8192, 864, 1088)
M50 = Size("50M", 512, 12, 24576, 1376, 1760)
TINY = Size("tiny", 192, 4, 512, 512, 608)
"""For --quick."""
HYBRID = ("rwkv", "rwkv", "rwkv", "attn")
PURE = ("rwkv",)


def block_config(size: Size, kind: str) -> dict[str, Any]:
    """A block by its name in a pattern: rwkv or attn."""
    if kind == "rwkv":
        return {
            "mixer": {"type": "rwkv7", "head_dim": 64},
            "ffn": {"type": "channel_mix", "hidden_dim": size.channel_mix},
        }
    return {
        "mixer": {"type": "attention", "num_heads": size.num_heads},
        "ffn": {"type": "swiglu", "hidden_dim": size.swiglu},
    }


def config(size: Size, pattern: tuple[str, ...]) -> ModelConfig:
    """One of our models; the pattern is repeated until the layers are full."""
    return ModelConfig.model_validate(
        {
            "vocab_size": size.vocab_size,
            "dim": size.dim,
            "head": "tied",
            "core": {
                "type": "stack",
                "blocks": {kind: block_config(size, kind) for kind in dict.fromkeys(pattern)},
                "pattern": list(pattern),
                "repeat": size.layers // len(pattern),
            },
        }
    )


def build(size: Size, pattern: tuple[str, ...]) -> HybridLM:
    """One of our models with random weights, none of them zero."""
    torch.manual_seed(0)
    model = HybridLM(config(size, pattern))
    wake(model)
    return model


def wake(model: torch.nn.Module) -> None:
    """Gives matrices that start at zero small random values, as after some training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.02)


def tokens(size: Size, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size.vocab_size, (rows, length), generator=generator)
