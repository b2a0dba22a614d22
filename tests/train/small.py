"""A run small enough to be done hundreds of times: a byte hybrid of a few thousand weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from valkyrie_core.data.dataset import Dataset
from valkyrie_core.data.dataset import prepare as prepare_data
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.checkpoint import list_checkpoints, verify
from valkyrie_core.train.metrics import TIMING_FIELDS, read_metrics
from valkyrie_core.train.progress import StepEvent, Validation
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.session import TrainResult, train_run
from valkyrie_core.train.storage import Storage

SENTENCES = (
    "When shall we three meet again, in thunder, lightning, or in rain?",
    "So foul and fair a day I have not seen.",
    "Double, double toil and trouble; fire burn and caldron bubble.",
    "Out, damned spot! out, I say!",
)

BLOCKS = {
    "rwkv": {
        "mixer": {
            "type": "rwkv7",
            "head_dim": 8,
            "decay_rank": 4,
            "rate_rank": 4,
            "value_rank": 4,
            "gate_rank": 4,
        },
        "ffn": {"type": "channel_mix", "hidden_dim": 24},
    },
    "attn": {
        "mixer": {"type": "attention", "num_heads": 2},
        "ffn": {"type": "swiglu", "hidden_dim": 24},
    },
}
MUON = {"type": "muon", "lr": 0.01, "adamw": {"lr": 0.003}}


def write_texts(directory: Path) -> None:
    """A dozen small documents."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        lines = [SENTENCES[(i + j) % len(SENTENCES)] + f" {i * j}" for j in range(4)]
        (directory / f"{i:02d}.txt").write_text("\n".join(lines))


def recipe(
    folder: Path,
    *,
    runs: str = "runs",
    name: str = "small",
    model: dict[str, Any] | None = None,
    **train: Any,
) -> Recipe:
    """A recipe whose texts and runs lie in `folder`; keywords go into `train`."""
    texts = folder / "texts"
    if not texts.exists():
        write_texts(texts)
    settings: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "context_len": 16,
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "eval_tokens": 256,
        "eval_every": 3,
        "log_every": 2,
        "precision": "fp32",
    }
    return Recipe.model_validate(
        {
            "name": name,
            "runs_dir": str(folder / runs),
            "device": "cpu",
            "seed": 1,
            "data": {
                "corpora": {
                    "plays": {
                        "type": "files",
                        "paths": [str(texts)],
                        "holdout": {"type": "names", "names": ["*/11.txt"]},
                    }
                },
                "tokenizer": {"type": "bytes"},
            },
            "model": {
                "dim": 16,
                "core": {"type": "stack", "blocks": BLOCKS, "pattern": ["rwkv", "attn"]},
                **(model or {}),
            },
            "train": settings | train,
        }
    )


def evaluate(model: HybridLM, dataset: Dataset, poll: Callable[[], None]) -> Validation:
    """Bits per byte of the start of the held-out document (a byte is a token here)."""
    torch.rand(3)  # disturbs the global generator on purpose: training must not notice
    text = dataset.corpora["plays"].validation.document_tokens(0)[:65].astype("int64")
    tokens_1T = torch.from_numpy(text)[None]
    state, nats = model.init_state(1), 0.0
    for start in range(0, 64, 16):
        poll()
        window = slice(start, start + 16)
        losses, state = model.token_losses(
            tokens_1T[:, :-1][:, window], tokens_1T[:, 1:][:, window], state
        )
        nats += float(losses.sum())
    bpb = nats / 64 / 0.6931471805599453
    return Validation(bpb, {"plays": bpb})


def sample(model: HybridLM, dataset: Dataset, prompt: str, poll: Callable[[], None]) -> str:
    """The most likely next byte, as a number."""
    poll()
    tokens = torch.tensor([dataset.tokenizer.encode(prompt)])
    logits = model(tokens, model.init_state(1)).logits_BTV[0, -1]
    return str(int(logits.argmax()))


def train(
    settings: Recipe,
    *,
    cache: Path,
    storage: Storage | None = None,
    progress: Callable[[StepEvent], None] = lambda _event: None,
    **keywords: Any,
) -> TrainResult:
    """`train_run` with the evaluation and sampling of this file."""

    def prepare(tokenizer: Any) -> Dataset:
        return prepare_data(settings.data, cache=cache, tokenizer=tokenizer)

    return train_run(
        settings,
        prepare=keywords.pop("prepare", prepare),
        evaluate=keywords.pop("evaluate", evaluate),
        sample=keywords.pop("sample", sample),
        progress=progress,
        command="valkyrie train small",
        resume_command="valkyrie train small --resume",
        storage=storage,
        **keywords,
    )


def digest(run: RunDir | Path) -> str:
    """Every bit of the newest checkpoint that training decides: no clock, no process number."""
    path = run.path if isinstance(run, RunDir) else run
    checkpoint = verify(list_checkpoints(path / "checkpoints")[0][1])
    content = hashlib.sha256()
    for tensors in (checkpoint.model_tensors(), checkpoint.training_tensors()):
        for name, tensor in sorted(tensors.items()):
            content.update(name.encode())
            content.update(str((tensor.dtype, tensor.shape)).encode())
            content.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    meta = checkpoint.meta | {"position": checkpoint.meta["position"] | {"seconds": None}}
    content.update(json.dumps(meta, sort_keys=True).encode())
    return content.hexdigest()


def rows(run: RunDir | Path) -> list[dict[str, Any]]:
    """The metrics without the fields that depend on the clock."""
    path = run.path if isinstance(run, RunDir) else run
    return [
        {key: value for key, value in row.items() if key not in TIMING_FIELDS}
        for row in read_metrics(path / "metrics.jsonl")
    ]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint."""
    return verify(list_checkpoints(run.checkpoints)[0][1]).model_tensors()
