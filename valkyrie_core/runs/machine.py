"""What this machine can do, with a self test that trains one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from valkyrie_core import kernels
from valkyrie_core.cache import cache_dir
from valkyrie_core.machine.doctor import examine
from valkyrie_core.machine.hardware import environment
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.report import Check, DoctorReport
from valkyrie_core.train.device import resolve_device
from valkyrie_core.train.optim import AdamWConfig, build_optimizers

SELF_TEST_MODEL = {
    "vocab_size": 64,
    "dim": 32,
    "core": {
        "blocks": {
            "rwkv": {
                "mixer": {"type": "rwkv7", "head_dim": 16},
                "ffn": {"type": "channel_mix"},
            },
            "attention": {
                "mixer": {"type": "attention", "num_heads": 2},
                "ffn": {"type": "swiglu"},
            },
        },
        "pattern": ["rwkv", "attention"],
    },
}


def examine_machine(runs_dir: Path, progress: Callable[[str], None] | None) -> DoctorReport:
    """Every check, and the environment as a run would record it."""
    device = resolve_device("auto")
    checks = [
        Check(status=check.status, what=check.what, detail=check.detail, fix=check.fix)
        for check in examine(
            runs_dir=runs_dir,
            cache_dir=cache_dir(),
            kernels=kernels,
            self_test=train_one_step,
            device=str(device),
            progress=progress,
        )
    ]
    return DoctorReport(
        ok=all(check.status != "fail" for check in checks),
        environment=environment(),
        checks=checks,
    )


def train_one_step() -> tuple[float, float]:
    """The loss of a tiny hybrid before and after one step on one batch."""
    device = resolve_device("auto")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HybridLM(ModelConfig.model_validate(SELF_TEST_MODEL)).to(device)
        tokens_BT = torch.randint(5, 64, (2, 33)).to(device)
    optimizers = build_optimizers(AdamWConfig(lr=1e-3), model)
    losses = []
    for _ in range(2):
        loss, _, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(2))
        torch.autograd.backward(loss)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[1]
