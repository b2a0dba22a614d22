"""Does training work on this machine at all: one step of a tiny hybrid, twice."""

from __future__ import annotations

import torch

from valkyrie_core.nn.model import HybridLM, HybridLMConfig

CONFIG = {
    "vocab_size": 32,
    "dim": 16,
    "core": {
        "blocks": {
            "rwkv": {"mixer": {"type": "rwkv7", "head_dim": 8}, "ffn": {"type": "channel_mix"}},
            "attn": {"mixer": {"type": "attention", "num_heads": 2}, "ffn": {"type": "swiglu"}},
        },
        "pattern": ["rwkv", "attn"],
    },
}
"""One block of each kind, a few thousand parameters."""


def train_one_step(device: str = "cpu", seed: int = 0) -> tuple[float, float]:
    """The loss of a tiny hybrid before and after one optimizer step, in nats per token.

    Leaves torch's global generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HybridLM(HybridLMConfig.model_validate(CONFIG))
        tokens_BT = torch.randint(32, (2, 49))
    model, tokens_BT = model.to(device), tokens_BT.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = (tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(2))
    before, _, _ = model.loss(*batch)
    torch.autograd.backward(before)
    optimizer.step()
    with torch.no_grad():
        after, _, _ = model.loss(*batch)
    return float(before.detach()), float(after)
