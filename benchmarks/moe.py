"""What balance does to a mixture of experts, and what the experts do beside a dense model.

    python -m benchmarks.moe                # trains what is still missing, then writes the tables
    python -m benchmarks.moe --tables       # only writes docs/moe.md anew

A queue that outlives an interruption: one training is one process of one thread, `--processes` of
them at a time, and goes on from its checkpoint. All arms have the recipe `moe`'s texts, steps and
seeds, and a router's arms its parameters too. What a step takes is measured first, all arms side by
side; it also says how many steps a dense model makes in the time of the experts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import quiet, result
from benchmarks.jobs import Found, Study, run_study, where
from benchmarks.timing import side_by_side
from valkyrie_core import Recipe, runs
from valkyrie_core.allocate.page import estimate
from valkyrie_core.allocate.statistics import difference, mean_of
from valkyrie_core.compare.speed import training_step
from valkyrie_core.errors import ValkyrieError
from valkyrie_core.report import Estimate
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

SPEED = result.RESULTS / "moe" / "speed.json"
ROUNDS = 9
MEASURES = ("max_vio", "dead", "effective_experts", "experts_per_token")


class Arm(NamedTuple):
    """What is trained."""

    title: str
    ffn: dict[str, str]
    """Keys of the experts' section that differ from the recipe's; without experts: all of it."""
    dense: bool = False
    seconds_of: str | None = None
    """As many steps as take the seconds of this arm; None: the recipe's."""


AUX = "[{type: aux, coefficient: 0.01}]"
BIAS = "[{type: bias, rate: 0.01}]"
# 8/3 x 64 channels, rounded: as wide as a token's two experts together
DENSE = "{type: swiglu, hidden_dim: 192}"
ARMS = {
    "none": Arm("no balance", {"balance": "[]"}),
    "aux": Arm("auxiliary loss", {"balance": AUX}),
    "noisy": Arm(
        "noisy top-k and importance loss",
        {"gate": "{type: noisy_topk, top_k: 2}", "balance": "[{type: importance}]"},
    ),
    "bias": Arm("bias, loss-free", {"balance": BIAS}),
    "groups": Arm(
        "4 groups, 2 of them, and bias",
        {"balance": BIAS, "groups": "{num_groups: 4, top_groups: 2}"},
    ),
    "top_p": Arm(
        "top-p (mass 0.3, at most 4) and bias",
        {
            "gate": "{type: top_p, mass: 0.3, max_experts: 4}",
            "balance": BIAS,
            # else they would be half as wide, as a token may meet four
            "expert": "{type: mlp, hidden_dim: 96}",
        },
    ),
    "dense": Arm("dense, equal FLOPs for a token", {"": DENSE}, dense=True),
    "dense_seconds": Arm("dense, equal seconds", {"": DENSE}, dense=True, seconds_of="bias"),
}


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, then writes the page."""
    return run_study(STUDY, arguments)


def _overrides(arm: str) -> list[str]:
    recipe = Recipe.load(STUDY.recipe)
    overrides = [
        f"model.core.blocks.{block}.ffn{'.' + key if key else ''}={value}"
        for block in recipe.model.core.blocks
        for key, value in ARMS[arm].ffn.items()
    ]
    other = ARMS[arm].seconds_of
    if other is not None:
        steps = round(recipe.train.steps * _step_ms()[other] / _step_ms()[arm])
        overrides.append(f"train.steps={steps}")
    return overrides


def _step_ms() -> dict[str, float]:
    """Milliseconds of a step by arm."""
    try:
        content = json.loads(SPEED.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValkyrieError(
            f"what a step takes was not measured: {error}", hint="python -m benchmarks.moe"
        ) from None
    return {str(arm): float(value) for arm, value in content["milliseconds"].items()}


def _measure_speed(study: Study, runs_dir: Path) -> None:
    """What a step of every arm takes, on one thread as they are trained."""
    if SPEED.exists():
        return
    if (noise := quiet.disturbance()) is not None:
        log.warning("%s", noise)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arms = {arm: one for arm, one in ARMS.items() if one.seconds_of is None}
        calls = {arm: training_step(study.recipe_of(arm, 0, runs_dir)) for arm in arms}
        timings = side_by_side(
            calls, repeats=ROUNDS, sample_seconds=1, announce=lambda text: log.info("%s", text)
        )
        measured = {arm: 1000 * timing.spread.median for arm, timing in timings.items()}
        for arm, one in ARMS.items():
            if one.seconds_of is not None:
                measured[arm] = measured["dense"]
        content = {"milliseconds": measured, "origin": result.origin()._asdict()}
    finally:
        torch.set_num_threads(threads)
    SPEED.parent.mkdir(parents=True, exist_ok=True)
    Storage().replace_json(SPEED, content)


def _train(arm: str, recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.runs_dir, recipe.name)
    trained = runs.train(recipe, resume=(folder / "checkpoints").exists())
    found: dict[str, Any] = {
        "steps": trained.steps,
        "tokens": trained.tokens_seen,
        "parameters": trained.parameters,
        "active": runs.plan(recipe).parameters.active,
        "seconds": trained.seconds,
        "precision": trained.precision,
        "bpb": trained.val_bpb,
        "bpb_by_corpus": trained.val_bpb_by_corpus,
    }
    if not ARMS[arm].dense:
        # of the last step, not the best one: no arm may profit from a choice
        report = runs.experts(folder, step=trained.steps, knock_out=False, save=False)
        found["layers"] = [
            {
                "max_vio": layer.max_vio,
                "dead": len(layer.dead or ()),
                "effective_experts": layer.effective_experts,
                "experts_per_token": layer.experts_per_token,
            }
            for layer in report.layers
        ]
    return found


def balance_table(found: Sequence[Found], step_ms: dict[str, float]) -> str:
    """What was found, arm by arm; every arm against the one without balance; dense models against
    experts.
    """
    by_arm = {arm: [one for one in found if one["arm"] == arm] for arm in ARMS}
    by_arm = {arm: own for arm, own in by_arm.items() if own}
    routed = [arm for arm in by_arm if not ARMS[arm].dense]
    dense = [arm for arm in by_arm if ARMS[arm].dense]
    corpora = list(found[0]["bpb_by_corpus"])
    heads = ["arm", "seeds", "MaxVio", "dead", "effective", "of a token", "bits per byte"]
    heads += corpora
    heads += ["steps", "ms a step"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for arm, own in by_arm.items():
        routing = [_over_layers(own, key) for key in MEASURES]
        lines.append(
            f"| {ARMS[arm].title} | {len(own)} | {' | '.join(routing)} | "
            f"{_text([one['bpb'] for one in own], 4)} | "
            + " | ".join(_text([one["bpb_by_corpus"][name] for one in own], 3) for name in corpora)
            + f" | {own[0]['steps']:,} | {step_ms[arm]:.0f} |"
        )
    worst = ", ".join(f"{ARMS[arm].title} {_worst(by_arm[arm]):.2f}" for arm in routed)
    lines += ["", f"- MaxVio of the worst layer and seed: {worst}"]
    against = [_against("none", by_arm, routed), _against("bias", by_arm, dense)]
    return "\n".join([*lines, "", *filter(None, against), "", _where(found)])


def _over_layers(own: Sequence[Found], key: str) -> str:
    """Mean over layers, then over seeds."""
    if "layers" not in own[0]:
        return "-"
    means = [sum(layer[key] for layer in one["layers"]) / len(one["layers"]) for one in own]
    return _text(means, 2)


def _against(base: str, by_arm: dict[str, list[Found]], arms: Sequence[str]) -> str | None:
    """Differences of the loss, paired by seed."""
    reference = {one["seed"]: one["bpb"] for one in by_arm.get(base, ())}
    parts = []
    for arm in arms:
        own = by_arm[arm]
        pairs = [(one["bpb"], reference[one["seed"]]) for one in own if one["seed"] in reference]
        if arm == base or len(pairs) < 2:
            continue
        mean = difference([a for a, _ in pairs], [b for _, b in pairs])
        sure = "" if mean.reaches_zero else " (surely)"
        parts.append(f"{ARMS[arm].title} {mean.value:+.4f} ± {mean.half_width:.4f}{sure}")
    if not parts:
        return None
    return f"- bits per byte against {ARMS[base].title}, paired by seed: {'; '.join(parts)}"


def _worst(own: Sequence[Found]) -> float:
    """The largest MaxVio of any layer and seed."""
    return max(float(layer["max_vio"]) for one in own for layer in one["layers"])


def _text(values: Sequence[float], digits: int) -> str:
    mean = mean_of(values)
    return estimate(Estimate(mean=mean.value, half_width=mean.half_width, seeds=mean.seeds), digits)


def _where(found: Sequence[Found]) -> str:
    sizes = [one["parameters"] for one in found if not ARMS[one["arm"]].dense]
    return (
        "Means and Student's 95 % intervals over the seeds; routing on held-out text, mean over "
        f"layers. {min(sizes):,} to {max(sizes):,} parameters, {found[0]['steps']:,} steps, "
        f"{found[0]['tokens']:,} tokens. {where(found)}, {found[0]['precision']}, one thread a "
        "training, two at a time. Steps were timed alone, side by side."
    )


STUDY = Study(
    name="moe",
    about=__doc__.splitlines()[0],
    recipe="moe",
    arms=ARMS,
    overrides=_overrides,
    train=_train,
    page="moe.md",
    tables=lambda found: {"moe": balance_table(found, _step_ms())},
    measure=_measure_speed,
)


if __name__ == "__main__":
    raise SystemExit(main())
