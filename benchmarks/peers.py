"""The models of others, with random weights, at our sizes.

None of them is needed: what is not installed is left out, and says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from benchmarks.models import Size


class AbsentError(Exception):
    """A peer is not installed; the message says how to have it."""


def module(name: str, package: str) -> Any:
    """An optional module.

    Raises:
        AbsentError: it is not installed.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise AbsentError(f"it is not installed (pip install {package})")
    return importlib.import_module(name)


def llama(size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """Hugging Face's LlamaForCausalLM with torch's SDPA.

    Raises:
        AbsentError: transformers is not installed.
    """
    transformers = module("transformers", "transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.dim,
        intermediate_size=size.swiglu,
        num_hidden_layers=size.layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        # generation goes on until it is told to stop
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def llama_layer(size: Size) -> tuple[torch.nn.Module, Any]:
    """One decoder layer of that Llama, and what makes its rotary positions of (x, ids).

    Raises:
        AbsentError: transformers is not installed.
    """
    model = llama(size._replace(layers=1)).model
    return model.layers[0], model.rotary_emb
