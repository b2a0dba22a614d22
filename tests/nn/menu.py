"""One small configuration for every type of every union: the laws run over all of them."""

from __future__ import annotations

from typing import Any

from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.recursive import Recursive

VOCAB = 23
RWKV = {"type": "rwkv7", "head_dim": 8, "decay_rank": 3, "rate_rank": 4, "gate_rank": 5}
ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
NEAR = {"type": "attention", "num_heads": 2, "window": 5, "sinks": 2}
SKIP = {"type": "skip"}
ROUTED: dict[str, dict[str, Any]] = {
    "routed-soft": {
        "type": "routed",
        "mixers": {"rwkv": RWKV, "attn": ATTENTION, "skip": SKIP},
        "adaptation": 0.4,
    },
    "routed-hard": {
        "type": "routed",
        "mixers": {"rwkv": RWKV, "attn": ATTENTION, "skip": SKIP},
        "soft_share": 0,
        "confidence_threshold": 0.5,
        "budget": {"flops": 0.75},
    },
    "routed-blocks": {
        "type": "routed",
        "mixers": {"near": NEAR, "rwkv": RWKV},
        "soft_share": 0,
        "adaptation": 0.3,
        "block_len": 4,
    },
    "routed-lot": {
        "type": "routed",
        "mixers": {"rwkv": RWKV, "attn": ATTENTION, "skip": SKIP},
        "gate": "lot",
        "soft_share": 0,
    },
    "routed-sparsemax": {
        "type": "routed",
        "mixers": {"skip": SKIP, "attn": ATTENTION, "near": NEAR},
        "gate": "sparsemax",
        "soft_share": 0,
        "adaptation": 0.7,
    },
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "hierarchical": {
        "type": "hierarchical",
        "inner": RWKV,
        "scales": {"type": "bands", "shortest": 1.5, "longest": 40, "bound": 0.7},
    },
    "hierarchical-strides": {
        "type": "hierarchical",
        "inner": {**RWKV, "eigenvalues": "signed"},
        "scales": {"type": "strides", "strides": [1, 3, 4]},
    },
}
MIXERS: dict[str, dict[str, Any]] = {
    **HIERARCHICAL,
    "structure": {"type": "structure", "chunk_len": 3, "num_heads": 2},
    "structure-rounds": {"type": "structure", "chunk_len": 4, "num_heads": 4, "rounds": 2},
    "rwkv7": RWKV,
    "rwkv7-signed": {**RWKV, "eigenvalues": "signed"},
    "attention": {"type": "attention", "num_heads": 4},
    "attention-gqa": {"type": "attention", "num_heads": 4, "num_kv_heads": 2},
    "attention-nope": {"type": "attention", "num_heads": 2, "position": {"type": "none"}},
    "attention-yarn": {
        "type": "attention",
        "num_heads": 2,
        "position": {"type": "yarn", "theta": 50, "factor": 3, "trained_context": 12},
    },
    "attention-alibi": {
        "type": "attention",
        "num_heads": 4,
        "num_kv_heads": 2,
        "position": {"type": "alibi"},
    },
    **ROUTED,
    "attention-sparsemax": {"type": "attention", "num_heads": 2, "normalizer": "sparsemax"},
    "attention-sparsemax-alibi": {
        "type": "attention",
        "num_heads": 4,
        "num_kv_heads": 2,
        "window": 5,
        "normalizer": "sparsemax",
        "position": {"type": "alibi"},
    },
    "attention-window": {"type": "attention", "num_heads": 2, "window": 5, "sinks": 2},
    "attention-window-alibi": {
        "type": "attention",
        "num_heads": 2,
        "window": 3,
        "sinks": 1,
        "position": {"type": "alibi"},
    },
    "attention-window-nope": {
        "type": "attention",
        "num_heads": 4,
        "num_kv_heads": 1,
        "window": 4,
        "sinks": 0,
        "position": {"type": "none"},
    },
}
FFNS: dict[str, dict[str, Any]] = {
    "swiglu": {"type": "swiglu", "hidden_dim": 20},
    "channel_mix": {"type": "channel_mix", "hidden_dim": 17},
}
MLP = {"type": "mlp", "hidden_dim": 12}
MOES: dict[str, dict[str, Any]] = {
    "moe": {"type": "moe", "num_experts": 5, "expert": MLP},
    "moe-sigmoid": {
        "type": "moe",
        "num_experts": 6,
        "gate": {"type": "sigmoid_topk", "top_k": 3, "scale": 1.5},
        "groups": {"num_groups": 3, "top_groups": 2},
        "shared_experts": 1,
        "expert": MLP,
    },
    "moe-noisy": {
        "type": "moe",
        "num_experts": 4,
        "gate": {"type": "noisy_topk"},
        "balance": [{"type": "importance"}],
        "expert": MLP,
    },
    "moe-switch": {
        "type": "moe",
        "num_experts": 3,
        "gate": {"type": "switch", "jitter": 0.1},
        "balance": [{"type": "aux"}, {"type": "z_loss"}],
        "dense_layers": 1,
        "expert": MLP,
    },
    "moe-top-p": {
        "type": "moe",
        "num_experts": 5,
        "gate": {"type": "top_p", "mass": 0.7, "max_experts": 3},
        "confidence": {},
        "expert": MLP,
    },
    "moe-exchange": {
        "type": "moe",
        "num_experts": 5,
        "gate": {"type": "top_p", "mass": 0.8, "max_experts": 3},
        "exchange": {"type": "attention", "width": 6},
        "expert": MLP,
    },
    "moe-chain": {
        "type": "moe",
        "num_experts": 4,
        "gate": {"type": "sigmoid_topk", "top_k": 4},
        "exchange": {"type": "chain", "rounds": 2},
        "expert": MLP,
    },
    "moe-transformer": {
        "type": "moe",
        "num_experts": 3,
        "expert": {"type": "transformer", "hidden_dim": 12, "num_heads": 2, "head_dim": 4},
    },
    "moe-transformer-chain": {
        "type": "moe",
        "num_experts": 3,
        "gate": {"type": "top_p", "mass": 0.9, "max_experts": 4},
        "exchange": {"type": "chain", "rounds": 2},
        "expert": {"type": "transformer", "hidden_dim": 12, "num_heads": 1, "head_dim": 5},
    },
}
DENSE = tuple(FFNS)
FFNS |= MOES


def model_config(mixer: str, ffn: str = "swiglu", *, layers: int = 2, **extra: Any) -> ModelConfig:
    """A model with one kind of block."""
    return ModelConfig.model_validate(
        {
            "vocab_size": VOCAB,
            "dim": 16,
            "core": {
                "type": "stack",
                "blocks": {"block": {"mixer": MIXERS[mixer], "ffn": FFNS[ffn]}},
                "pattern": ["block"],
                "repeat": layers,
            },
            **extra,
        }
    )


def hybrid_config(pattern: str = "rra", **extra: Any) -> ModelConfig:
    """A hybrid: r is RWKV-7 with channel mix, a is attention with SwiGLU."""
    blocks = {
        "r": {"mixer": MIXERS["rwkv7"], "ffn": FFNS["channel_mix"]},
        "a": {"mixer": MIXERS["attention-gqa"], "ffn": FFNS["swiglu"]},
    }
    used = {name: block for name, block in blocks.items() if name in pattern}
    core: dict[str, Any] = {"type": "stack", "blocks": used, "pattern": list(pattern)}
    if "feedback" in extra:
        core["feedback"] = extra.pop("feedback")
    return ModelConfig.model_validate({"vocab_size": VOCAB, "dim": 16, "core": core, **extra})


def recursive_config(
    pattern: str, *, prelude: str = "", coda: str = "", loops: int = 3, **extra: Any
) -> ModelConfig:
    """A looped hybrid; m is attention with experts, w has a window."""
    blocks = {
        "r": {"mixer": MIXERS["rwkv7"], "ffn": FFNS["channel_mix"]},
        "a": {"mixer": MIXERS["attention-gqa"], "ffn": FFNS["swiglu"]},
        "m": {"mixer": MIXERS["attention-alibi"], "ffn": FFNS["moe-chain"]},
        "w": {"mixer": MIXERS["attention-window"], "ffn": FFNS["moe-transformer"]},
        "h": {"mixer": MIXERS["hierarchical-strides"], "ffn": FFNS["channel_mix"]},
        "s": {"mixer": MIXERS["structure"], "ffn": FFNS["swiglu"]},
        "x": {"mixer": MIXERS["routed-hard"], "ffn": FFNS["swiglu"]},
        "y": {"mixer": MIXERS["routed-sparsemax"], "ffn": FFNS["channel_mix"]},
        "z": {"mixer": MIXERS["routed-soft"], "ffn": FFNS["swiglu"]},
    }
    used = {name: block for name, block in blocks.items() if name in pattern + prelude + coda}
    core = {
        "type": "recursive",
        "blocks": used,
        "prelude": list(prelude),
        "pattern": list(pattern),
        "coda": list(coda),
        "loops": loops,
    }
    for key in ("halting", "loop_loss"):
        if key in extra:
            core[key] = extra.pop(key)
    tree = {"vocab_size": VOCAB, "dim": 16, "core": core, **extra}
    return ModelConfig.model_validate(tree)


CONFIGS: dict[str, ModelConfig] = {
    **{f"{mixer}+{ffn}": model_config(mixer, ffn) for mixer in MIXERS for ffn in DENSE},
    **{
        f"{mixer}+{ffn}": model_config(mixer, ffn)
        for mixer in ("rwkv7", "attention-gqa")
        for ffn in MOES
    },
    "hybrid": hybrid_config(),
    "hybrid-attention-first": hybrid_config("arr"),
    "one-layer": hybrid_config("r"),
    "feedback": hybrid_config("rara", feedback={"type": "gated"}),
    "feedback-attention-first": hybrid_config("aarr", feedback={"type": "gated"}),
    "rms-norm": hybrid_config(norm="rms_norm"),
    "tied": hybrid_config(head="tied"),
    "recursive": recursive_config("ra", prelude="a", coda="r"),
    "recursive-rwkv7": recursive_config("r", norm="rms_norm"),
    "recursive-experts": recursive_config("mw", loops=2),
    "recursive-once": recursive_config("a", loops=1),
    "recursive-groups": recursive_config("hs", prelude="h", loops=2),
}
SURE = {"type": "confidence", "threshold": 0.5, "bias": 0.0}
HALTING: dict[str, ModelConfig] = {
    f"recursive-{rule['type']}-{prelude}{pattern}": recursive_config(
        pattern, prelude=prelude, halting=rule
    )
    for pattern, prelude, rule in (
        ("ra", "", {"type": "latent", "threshold": 0.6}),
        ("r", "a", {"type": "kl", "threshold": 0.3}),
        ("am", "", {"type": "argmax"}),
        ("wr", "r", SURE),
        ("sh", "h", {"type": "latent", "threshold": 0.7}),
        ("xr", "", {"type": "latent", "threshold": 0.6}),
        ("xy", "r", {**SURE, "then": "cheapest"}),
        ("az", "", {**SURE, "then": "cheapest"}),
    )
}
"""Cores whose tokens leave the loops when they are done."""


def awake(config: ModelConfig, seed: int = 0) -> HybridLM:
    """A model in fp64 whose zero-initialised outputs are woken, or laws would hold trivially.

    Not in training, where some gates draw noise.
    """
    import torch

    torch.manual_seed(seed)
    model = HybridLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if isinstance(model.core, Recursive):
        model.core.halts = True
    return model.eval()
