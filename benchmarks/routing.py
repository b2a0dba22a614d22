"""What a router among mixers is worth: right answers, operations, seconds, and who goes where.

    python -m benchmarks.routing               # trains what is missing, writes the table
    python -m benchmarks.routing --tables      # only writes docs/adaptive_mixers.md anew

The recipe `routing` with routers at several budgets, and beside them: layers that choose by lot,
static layers, and mixtures of depths, which run or skip; three seeds each. A queue that outlives an
interruption by whole trainings. Operations are those of the mixers that ran, of those of RWKV-7 in
all layers; seconds are those of reading held-out text, beside a model of RWKV-7 alone that reads it
in the same process, in turns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.jobs import Found, Study, run_study, where
from valkyrie_core import Recipe, runs
from valkyrie_core.allocate.statistics import mean_of
from valkyrie_core.data.dataset import prepare
from valkyrie_core.data.packing import PackedSplit
from valkyrie_core.experts.measures import mutual_information
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.routed import RoutedMixer

TASKS = ("copy", "parity", "recall")
RWKV = "{type: rwkv7, head_dim: 32, eigenvalues: signed}"
ATTN = "{type: attention, num_heads: 4}"
ROWS = 16
REPEATS = 9
"""Readings of the same text; the fastest counts."""


class Arm(NamedTuple):
    """What is changed of the recipe."""

    title: str
    budget: float | None
    overrides: tuple[str, ...]


def _routed(title: str, budget: float, *more: str) -> Arm:
    keys = [f"model.core.blocks.layer.mixer.budget.flops={budget}"]
    keys += [f"model.core.blocks.layer.mixer.{one}" for one in more]
    return Arm(title, budget, tuple(keys))


def _static(title: str, *mixers: str) -> Arm:
    ffn = "{type: swiglu, hidden_dim: 128}"
    blocks = ", ".join(
        f"b{i}: {{mixer: {mixer}, ffn: {ffn}}}" for i, mixer in enumerate(dict.fromkeys(mixers))
    )
    order = list(dict.fromkeys(mixers))
    pattern = ", ".join(f"b{order.index(mixer)}" for mixer in mixers)
    return Arm(
        title,
        None,
        (f"model.core={{type: stack, blocks: {{{blocks}}}, pattern: [{pattern}]}}",),
    )


def _depths(title: str, budget: float) -> Arm:
    """Layers of RWKV-7, attention and RWKV-7, each of which a token may skip."""
    ffn = "ffn: {type: swiglu, hidden_dim: 128}"
    blocks = ", ".join(
        f"{name}: {{mixer: {{type: routed, mixers: {{run: {mixer}, skip: {{type: skip}}}}, "
        f"soft_share: 0.5, budget: {{flops: {budget}, context_len: 96}}}}, {ffn}}}"
        for name, mixer in (("rwkv", RWKV), ("attn", ATTN))
    )
    core = f"{{type: stack, blocks: {{{blocks}}}, pattern: [rwkv, attn, rwkv]}}"
    return Arm(title, budget, (f"model.core={core}",))


ARMS = {
    "router_100": _routed("router", 1.0),
    "router_75": _routed("router", 0.75),
    "router_50": _routed("router", 0.5),
    "sparsemax_75": _routed("router, sparsemax", 0.75, "gate=sparsemax"),
    "lot_75": _routed("lots", 0.75, "gate=lot", "soft_share=0"),
    "lot_50": _routed("lots", 0.5, "gate=lot", "soft_share=0"),
    "depths_75": _depths("mixture of depths: RWKV-7, attention, RWKV-7", 0.75),
    "depths_50": _depths("mixture of depths: RWKV-7, attention, RWKV-7", 0.5),
    "hybrid": _static("static: RWKV-7, attention, RWKV-7", RWKV, ATTN, RWKV),
    "attention": _static("static: attention", ATTN, ATTN, ATTN),
    "rwkv": _static("static: RWKV-7", RWKV, RWKV, RWKV),
}


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, then writes the page."""
    return run_study(STUDY, arguments)


def _train(_arm: str, recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.runs_dir, recipe.name)
    report = runs.train(recipe, resume=(folder / "recipe.json").exists())
    corpora = runs.evaluate(folder).corpora
    model, tokenizer, recipe = runs.load(folder)
    assert isinstance(model, HybridLM)
    splits = {
        name: corpus.validation
        for name, corpus in prepare(recipe.data, tokenizer=tokenizer).corpora.items()
    }
    texts = {task: text_of(splits[task], recipe.train.context_len) for task in TASKS}
    found = read(model, texts)
    return {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "accuracy": {task: corpora[task].accuracy.share for task in TASKS},  # type: ignore[union-attr]
        **found,
        "time": seconds_beside(model, rwkv_alone(recipe.model), texts),
    }


def text_of(split: PackedSplit, context_len: int) -> tuple[Tensor, Tensor]:
    """Tokens and documents [rows, context_len] of the beginning of a split."""
    count = min(len(split.tokens) // context_len, ROWS) * context_len
    tokens_T = np.asarray(split.tokens[:count]).astype(np.int64)
    doc_T = np.searchsorted(split.doc_starts, np.arange(count), side="right")
    shape = (-1, context_len)
    return torch.from_numpy(tokens_T).view(shape), torch.from_numpy(doc_T).view(shape)


@torch.inference_mode()
def read(model: HybridLM, texts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The operations of what ran, and what routes tell of tasks, by layer."""
    context_len = next(iter(texts.values()))[0].shape[1]
    whole = operations_of(rwkv_alone(model.config), context_len, [])
    routers = [one.mixer for one in model.core.layers if isinstance(one.mixer, RoutedMixer)]
    if not routers:
        operations = operations_of(model, context_len, []) / whole
        return {"operations": operations, "information": None, "shares": None}
    counts = np.zeros((len(routers), len(texts), max(len(one.names) for one in routers)))
    for task, (tokens_BT, doc_BT) in enumerate(texts.values()):
        routes = model(tokens_BT, model.init_state(len(tokens_BT)), doc_BT).told.routes
        for layer, route in enumerate(routes):
            used_M = route.used_BTM.sum((0, 1)).numpy()
            counts[layer, task, : len(used_M)] += used_M
    tokens = np.array([text[0].numel() for text in texts.values()])
    # tasks count alike, however much text each has
    shares = counts / tokens[None, :, None]
    return {
        "operations": operations_of(model, context_len, shares.mean(1).tolist()) / whole,
        "information": [mutual_information(own) for own in shares],
        "shares": shares.tolist(),
    }


def rwkv_alone(config: ModelConfig) -> HybridLM:
    """As many layers of the same width, all of RWKV-7: what is measured by."""
    core = Recipe.load("routing", ARMS["rwkv"].overrides).model.core
    assert len(core.layers) == len(config.core.layers)
    return HybridLM(config.model_copy(update={"core": core})).eval()


def operations_of(model: HybridLM, context_len: int, shares: Sequence[Any]) -> float:
    """Forward operations of all mixers per token.

    Args:
        shares: of every layer with a router, the share of tokens that went through each mixer.
    """
    total, left = 0.0, list(shares)
    for block in model.blocks():
        if isinstance(block.mixer, RoutedMixer):
            own_M = left.pop(0)
            each = [one.cost(context_len).flops_per_token for one in block.mixer.each]
            total += sum(share * one for share, one in zip(own_M, each, strict=False))
        else:
            total += block.mixer.cost(context_len).flops_per_token
    return total


@torch.inference_mode()
def seconds_beside(
    model: HybridLM, other: HybridLM, texts: Mapping[str, tuple[Tensor, Tensor]]
) -> float:
    """Seconds of reading the texts, of those that another model takes."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(2 * REPEATS):
        one = (model, other)[turn % 2]
        began = time.perf_counter()
        for tokens_BT, doc_BT in texts.values():
            one(tokens_BT, one.init_state(len(tokens_BT)), doc_BT)
        times[turn % 2].append(time.perf_counter() - began)
    return min(times[0]) / min(times[1])


def table(found: Sequence[Found]) -> str:
    """Right answers by task, and what they cost."""
    heads = [*TASKS, "mean", "operations", "seconds", "tells of the task", "seeds"]
    lines = [f"| layers | budget | {' | '.join(heads)} |", "|---|---:" + "|---:" * 8 + "|"]
    for name, arm in ARMS.items():
        own = [one for one in found if one["arm"] == name]
        if not own:
            continue
        by_task = [[one["accuracy"][task] for one in own] for task in TASKS]
        means = [sum(shares) / len(shares) for shares in zip(*by_task, strict=True)]
        cells = [arm.title, "" if arm.budget is None else f"{arm.budget:.2f}"]
        cells += [f"{_mean(shares):.1%} ({min(shares):.0%})" for shares in by_task]
        cells.append(f"{_mean(means):.1%}")
        routed = own[0]["information"] is not None
        cells.append(f"{_mean([one['operations'] for one in own]):.2f}")
        cells.append(f"{_mean([one['time'] for one in own]):.2f}")
        told = [max((x or 0.0) for x in one["information"]) for one in own] if routed else []
        cells.append(f"{_mean(told):.2f}" if told else "")
        lines.append("| " + " | ".join([*cells, str(len(own))]) + " |")
    whole = len(found) == len(ARMS) * len(STUDY.seeds)
    lines += [
        "",
        "Right answers: the mean over the seeds, and in brackets the worst. Operations of the "
        "mixers that ran, and seconds of reading, of those of RWKV-7 in all layers, which costs "
        "most; a budget is of every layer's costliest mixer. What routes tell of the task: "
        "I(mixer; task) / H(task) of the "
        f"layer where it is most. One thread, {where(found)}."
        + ("" if whole else " **Partial: more to come.**"),
    ]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return mean_of(list(values)).value


STUDY = Study(
    name="routing",
    about=__doc__.splitlines()[0],
    recipe="routing",
    arms=ARMS,
    overrides=lambda arm: ARMS[arm].overrides,
    train=_train,
    page="adaptive_mixers.md",
    tables=lambda found: {"routing": table(found)},
)


if __name__ == "__main__":
    raise SystemExit(main())
