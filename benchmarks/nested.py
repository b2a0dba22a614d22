"""How many brackets inside each other a loop can work out, with and without memory tokens.

    python -m benchmarks.nested               # trains what is missing, writes the table
    python -m benchmarks.nested --tables      # only writes docs/reasoning.md anew

The recipe `nested` learns expressions of up to three operations inside each other, three seeds
each with so many memory tokens; without carry a loop has nothing to go on from, which is one loop.
Every model is asked expressions of depth 1 to 7, for as many loops as in training and, with
carry, for twice as many. A queue that outlives an interruption by whole trainings.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import result, tables
from benchmarks.jobs import Study, run_study
from valkyrie_core import Recipe, runs
from valkyrie_core.allocate.statistics import mean_of
from valkyrie_core.data.dataset import prepare
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.errors import ValkyrieError
from valkyrie_core.evaluate.rules import full_depth
from valkyrie_core.evaluate.thinking import think
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

RECIPE = "nested"
CORPUS = "expression"
SEEDS = (0, 1, 2)
PAGE = result.ROOT / "docs" / "reasoning.md"
FOLDER = result.RESULTS / "nested"
NAME = "nested"
DEPTHS = tuple(range(1, 8))
"""That are asked."""
ASKED = 400
"""Held-out expressions of every depth, up to those that are drawn twice."""
ENOUGH = 0.9
"""A depth is mastered from this share of right answers on."""


class Arm(NamedTuple):
    """What is changed."""

    memory_tokens: int
    carries: bool

    @property
    def overrides(self) -> list[str]:
        """Of the recipe."""
        loops = [] if self.carries else ["model.core.loops=1"]
        return [f"model.core.memory_tokens={self.memory_tokens}", *loops]


ARMS = {
    "memory_0": Arm(0, True),
    "memory_8": Arm(8, True),
    "alone_0": Arm(0, False),
    "alone_8": Arm(8, False),
    "memory_4": Arm(4, True),
    "memory_16": Arm(16, True),
}


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, then writes the page."""
    about = __doc__.splitlines()[0]
    module = "benchmarks.nested"
    study = Study(module, about, ARMS, SEEDS, _file, _train, _prepare, _write_page)
    return run_study(study, arguments)


def _prepare(_runs_dir: Path) -> None:
    prepare(Recipe.load(RECIPE).data)


def _file(arm: str, seed: int) -> Path:
    return FOLDER / f"{arm}-{seed}.json"


def arm_recipe(arm: str, seed: int, runs_dir: Path) -> Recipe:
    """The recipe of one training."""
    own = [f"name={NAME}-{arm}-{seed}", f"seed={seed}", f"runs_dir={runs_dir}"]
    return Recipe.load(RECIPE, [*own, *ARMS[arm].overrides])


def deeper(recipe: Recipe) -> Recipe:
    """The recipe with questions of all depths; none of them is trained on."""
    corpus = recipe.data.corpora[CORPUS]
    assert isinstance(corpus, QuestionsCorpus)
    task = corpus.task.model_copy(update={"depths": DEPTHS})
    asked = {"task": task, "examples": 1, "validation_examples": ASKED * len(DEPTHS)}
    data = {"corpora": {CORPUS: corpus.model_copy(update=asked)}}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


def _train(arm: str, seed: int, runs_dir: Path) -> None:
    torch.set_num_threads(1)
    recipe = arm_recipe(arm, seed, runs_dir)
    folder = runs_dir / recipe.name
    report = runs.train(recipe, resume=(folder / "recipe.json").exists())
    content = {
        "arm": arm,
        "seed": seed,
        "parameters": report.parameters,
        "seconds": report.seconds,
        "origin": result.origin()._asdict(),
        "by_loops": asked(folder, carries=ARMS[arm].carries),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    Storage().replace_json(_file(arm, seed), content)


def asked(folder: Path, *, carries: bool) -> dict[int, dict[int, float]]:
    """The share of right answers, by loops and by depth."""
    model, tokenizer, recipe = runs.load(folder)
    recipe = deeper(recipe)
    corpus = recipe.data.corpora[CORPUS]
    assert isinstance(corpus, QuestionsCorpus)
    split = prepare(recipe.data, tokenizer=tokenizer).corpora[CORPUS].validation
    levels = [one.difficulty for one in corpus.held_out()]
    found: dict[int, dict[int, float]] = {}
    full = full_depth(model)
    for loops in (full, 2 * full) if carries else (full,):
        right = think(model, split, depth=loops, context_len=recipe.train.context_len).right
        found[loops] = {
            depth: mean_of(
                [float(ok) for ok, level in zip(right, levels, strict=True) if level == depth]
            ).value
            for depth in DEPTHS
        }
    return found


def deepest(by_depth: Mapping[str, float]) -> int:
    """The last depth up to which all are mastered; 0: not even the first."""
    reached = 0
    for depth in DEPTHS:
        if by_depth[str(depth)] < ENOUGH:
            break
        reached = depth
    return reached


def _write_page() -> None:
    paths = [_file(arm, seed) for arm in ARMS for seed in SEEDS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if not found:
        raise ValkyrieError("there is no result yet", hint="python -m benchmarks.nested")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(tables.put(text, NAME, table(found)), encoding="utf-8")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Right answers by depth, and the deepest one that is mastered."""
    depths = " | ".join(f"depth {depth}" for depth in DEPTHS)
    lines = [
        f"| memory tokens | carry | loops | {depths} | deepest with {ENOUGH:.0%}, by seed |",
        "|---:|---|---:" + "|---:" * (len(DEPTHS) + 1) + "|",
    ]
    for name, arm in sorted(ARMS.items(), key=lambda one: (not one[1].carries, one[1])):
        results = [one for one in found if one["arm"] == name]
        if not results:
            continue
        for loops in results[0]["by_loops"]:
            own = [one["by_loops"][loops] for one in results]
            shares = [mean_of([one[str(depth)] for one in own]).value for depth in DEPTHS]
            cells = [str(arm.memory_tokens), "yes" if arm.carries else "no", loops]
            cells += [f"{share:.0%}" for share in shares]
            cells.append(", ".join(str(deepest(one)) for one in own))
            lines.append("| " + " | ".join(cells) + " |")
    origin = found[0]["origin"]
    whole = len(found) == len(ARMS) * len(SEEDS)
    lines += [
        "",
        f"Trained to depth 3; means over the seeds; one thread, {origin['processor']}, "
        f"{origin['date']}." + ("" if whole else " **Partial: more seeds to come.**"),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
