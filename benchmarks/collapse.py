"""Experts that were left to die: how long until all work again, with and without `revive`.

    python -m benchmarks.collapse               # trains what is missing, writes the table
    python -m benchmarks.collapse --tables      # only writes docs/moe.md anew

The recipe `moe` is trained while a bias sends every token to the same two of sixteen experts, in
every layer, and a loss teaches the routers to want that: a bias alone would leave the other rows of
a router as they were, and nothing would be left of the collapse without it. After 300 steps both
are taken away, and the balance of each arm is all there is. A queue that outlives an interruption
by whole trainings: one takes about two minutes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from benchmarks.jobs import Found, Study, run_study, where
from valkyrie_core import Recipe, runs
from valkyrie_core.allocate.statistics import difference, mean_of
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.nn.moe.router import Router
from valkyrie_core.train.routing import num_dead

HELD = 300
"""Steps in which the router is biased."""
AFTER = 500
"""Steps that are watched afterwards."""
FAVOURED = 2
"""Experts that get all tokens meanwhile."""
FEW = 0.05
"""Recovered: less than this share of all experts is dead ..."""
ROWS = 5
"""... in so many logged steps, one after the other."""
LOG_EVERY = 5


class Arm(NamedTuple):
    """What keeps experts in use."""

    title: str
    balance: str
    revive: bool


BALANCES = {
    "none": ("no balance", "[]"),
    "aux": ("auxiliary loss", "[{type: aux, coefficient: 0.01}]"),
    "bias": ("bias, loss-free", "[{type: bias, rate: 0.01}]"),
}
ARMS = {
    name + ("_revive" if revive else ""): Arm(title, balance, revive)
    for name, (title, balance) in BALANCES.items()
    for revive in (False, True)
}


class Hold:
    """Holds the routers of every layer that trains at its first experts, for so many steps.

    What moved a bias meanwhile is undone, and `revive` counts from the release on. An auxiliary
    loss is in force all the time; the one that is added here is many times as large.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._done: dict[int, int] = {}
        self._losses: list[Tensor] = []

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """In all modules meanwhile."""
        hooks = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _after(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        """A router's loss: minus the logarithm of its favoured experts' share; into its layer's."""
        if isinstance(module, Router) and module.training:
            share_R = output[1].probs_RE[:, :FAVOURED].sum(1)
            self._losses.append(-share_R.clamp(min=1e-20).log().mean())
        if isinstance(module, MoE) and module.training:
            losses, self._losses = self._losses, []
            if self._done[id(module)] <= self.steps:
                y_BTD, state, ctx = output
                added = tuple(("hold", loss) for loss in losses)
                return y_BTD, state, ctx._replace(aux=ctx.aux + added)
        return None

    @torch.no_grad()
    def _before(self, module: nn.Module, _inputs: Any) -> None:
        if not isinstance(module, MoE) or not module.training:
            return
        done = self._done[id(module)] = self._done.get(id(module), 0) + 1
        if done > self.steps + 1:
            return
        for router in module.each_router:
            router.bias_E.zero_()
            if done <= self.steps:
                router.bias_E[:FAVOURED] = 100.0
        if module.config.revive is not None:
            module.starved_E.zero_()


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, then writes the page."""
    return run_study(STUDY, arguments)


def _overrides(arm: str) -> list[str]:
    own = ARMS[arm]
    overrides = [
        f"train.steps={HELD + AFTER}",
        f"train.eval_every={HELD + AFTER}",
        f"train.log_every={LOG_EVERY}",
    ]
    for block in Recipe.load(STUDY.recipe).model.core.blocks:
        section = f"model.core.blocks.{block}.ffn"
        overrides.append(f"{section}.balance={own.balance}")
        if own.revive:
            overrides.append(f"{section}.revive={{}}")
    return overrides


def _train(_arm: str, recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.runs_dir, recipe.name)
    # the hold counts steps of this process: a training that was stopped starts anew
    shutil.rmtree(folder, ignore_errors=True)
    with Hold(HELD).everywhere():
        trained = runs.train(recipe)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    logged = [row for row in rows if row["kind"] == "train"]
    return {
        "dead": {row["step"]: _dead_share(row["load"]) for row in logged},
        "revived": sum(len(row["revived"]) for row in logged),
        "bpb": trained.val_bpb,
    }


def _dead_share(load: dict[str, list[int]]) -> float:
    dead = sum(num_dead(torch.tensor(one, dtype=torch.float64)) for one in load.values())
    return dead / sum(map(len, load.values()))


def recovered_after(dead: dict[int, float]) -> int | None:
    """Steps from the release to the first of `ROWS` rows with few dead experts; None: never."""
    steps = sorted(step for step in dead if step > HELD)
    for index in range(len(steps) - ROWS + 1):
        if all(dead[step] < FEW for step in steps[index : index + ROWS]):
            return steps[index] - HELD
    return None


def collapse_table(found: Sequence[Found]) -> str:
    """What was found, arm by arm, seed by seed."""
    lines = [
        f"| balance | revive | steps until under {FEW:.0%} dead, by seed | dead at the release | "
        "dead at the end | revived | bits per byte |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for arm, own in ARMS.items():
        results = [one for one in found if one["arm"] == arm]
        if not results:
            continue
        dead = [{int(step): share for step, share in one["dead"].items()} for one in results]
        times = [recovered_after(one) for one in dead]
        bpb = mean_of([one["bpb"] for one in results])
        width = "" if bpb.half_width is None else f" ± {bpb.half_width:.4f}"
        lines.append(
            f"| {own.title} | {'yes' if own.revive else 'no'} | "
            f"{', '.join('never' if time is None else str(time) for time in times)} | "
            f"{mean_of([one[HELD] for one in dead]).value:.0%} | "
            f"{mean_of([one[max(one)] for one in dead]).value:.0%} | "
            f"{mean_of([one['revived'] for one in results]).value:.0f} | "
            f"{bpb.value:.4f}{width} |"
        )
    lines += [
        "",
        *_with_revive(found),
        "",
        f"{HELD} steps held and {AFTER} watched; a row every {LOG_EVERY} steps, and recovered is "
        f"the first of {ROWS} in a row. Means over seeds, Student's 95 % intervals. "
        f"{where(found)}.",
    ]
    return "\n".join(lines)


def _with_revive(found: Sequence[Found]) -> list[str]:
    """What `revive` does to the loss beside each balance, paired by seed."""
    bpb = {(one["arm"], one["seed"]): one["bpb"] for one in found}
    parts = []
    for name, (title, _) in BALANCES.items():
        seeds = [s for s in STUDY.seeds if (name, s) in bpb and (f"{name}_revive", s) in bpb]
        if len(seeds) < 2:
            continue
        pair = [[bpb[arm, s] for s in seeds] for arm in (f"{name}_revive", name)]
        mean = difference(*pair)
        sure = "" if mean.reaches_zero else " (surely)"
        parts.append(f"{title} {mean.value:+.4f} ± {mean.half_width:.4f}{sure}")
    told = f"- bits per byte with `revive` less without, paired by seed: {'; '.join(parts)}"
    return [told] if parts else []


STUDY = Study(
    name="collapse",
    about=__doc__.splitlines()[0],
    recipe="moe",
    arms=ARMS,
    overrides=_overrides,
    train=_train,
    page="moe.md",
    tables=lambda found: {"collapse": collapse_table(found)},
)


if __name__ == "__main__":
    raise SystemExit(main())
