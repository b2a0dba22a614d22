"""Our RWKV-7 weights as a GGUF file, which llama.cpp reads.

All matrices, the low-rank factors too, are stored in one format; q8_0 needs rows of a multiple of
32.

llama.cpp keeps low-rank factors the other way round than the author, the six mixing vectors of a
time mix in one tensor, and a value residual in the first layer as well, where it is never used.

Shapes: D model, R rank, V vocabulary.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.rwkv_checkpoint import rwkv7_tensors

Format = Literal["f32", "bf16", "q8_0"]
"""How matrices are stored; vectors are always fp32."""

MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
"""In the order of llama.cpp's fused tensor."""
ATTENTION = {
    "receptance.weight": "time_mix_receptance",
    "key.weight": "time_mix_key",
    "value.weight": "time_mix_value",
    "output.weight": "time_mix_output",
    **{name: f"time_mix_{name}" for name in ("k_k", "k_a", "r_k", "w0", "a0", "v0")},
    **{f"{x}{i}": f"time_mix_{x}{i}" for x in "wavg" for i in (1, 2)},
}
FFN = {
    "x_k": "channel_mix_lerp_k",
    "key.weight": "channel_mix_key",
    "value.weight": "channel_mix_value",
}
WHOLE = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}


def authors_tensors(model: HybridLM) -> dict[str, Tensor]:
    """By the author's names; a tied head is written out, since his models have one of their own."""
    tensors = rwkv7_tensors(model)
    return {**tensors, "head.weight": model.head.weight.detach().clone()}


def llama_cpp_tensors(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The author's tensors by llama.cpp's names and shapes."""
    named = {ours: theirs[name].squeeze() for name, ours in WHOLE.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("blocks."))
    for index in range(layers):
        block, out = f"blocks.{index}.", f"blk.{index}."
        for kind in ("weight", "bias"):
            named[f"{out}attn_norm.{kind}"] = theirs[f"{block}ln1.{kind}"]
            named[f"{out}attn_norm_2.{kind}"] = theirs[f"{block}ln2.{kind}"]
            named[f"{out}time_mix_ln.{kind}"] = theirs[f"{block}att.ln_x.{kind}"]
        mixes = [theirs[f"{block}att.{name}"].reshape(1, 1, -1) for name in MIXES]
        named[f"{out}time_mix_lerp_fused.weight"] = torch.stack(mixes)
        for part, names in (("att", ATTENTION), ("ffn", FFN)):
            for name, ours in names.items():
                source = f"{block}{part}.{name}"
                if source not in theirs:
                    # the first layer's value residual: read, and never used
                    source = source.replace("att.v", "att.a")
                named[f"{out}{ours}.weight"] = _turned(theirs[source], name)
    return named


def _turned(tensor: Tensor, name: str) -> Tensor:
    """Low-rank factors [D, R] and [R, D] transposed; vectors flat."""
    if name[-1] in "12":
        return tensor.T
    return tensor.flatten() if tensor.dim() != 2 or name == "r_k" else tensor


def write(model: HybridLM, path: Path, format: Format) -> None:
    """Writes a pure RWKV-7 model; the `gguf` package does the rest."""
    gguf = importlib.import_module("gguf")
    theirs = authors_tensors(model)
    writer = gguf.GGUFWriter(str(path), "rwkv7")
    _write_sizes(writer, gguf, theirs)
    types = gguf.GGMLQuantizationType
    kind = {"f32": types.F32, "bf16": types.BF16, "q8_0": types.Q8_0}[format]
    for name, tensor in llama_cpp_tensors(theirs).items():
        values = tensor.float().contiguous().numpy()
        if tensor.dim() == 2 and kind is not types.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, gguf: Any, theirs: dict[str, Tensor]) -> None:
    vocab_size, dim = theirs["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("blocks."))
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(theirs["blocks.0.ffn.key.weight"].shape[0])
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(theirs["blocks.0.att.r_k"].shape[-1])
    writer.add_decay_lora_rank(theirs["blocks.0.att.w1"].shape[1])
    writer.add_iclr_lora_rank(theirs["blocks.0.att.a1"].shape[1])
    writer.add_value_residual_mix_lora_rank(theirs["blocks.1.att.v1"].shape[1])
    writer.add_gate_lora_rank(theirs["blocks.0.att.g1"].shape[1])
    # asked for, and not used
    writer.add_head_count(0)
    # no text passes through: the words are only counted
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"<{index}>" for index in range(vocab_size)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * vocab_size)
