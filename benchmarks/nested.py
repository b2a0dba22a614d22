"""How many brackets inside each other a loop can work out, with and without memory tokens.

    python -m benchmarks.nested               # trains what is missing, writes the table
    python -m benchmarks.nested --tables      # only writes docs/reasoning.md anew

The recipe `nested` learns expressions of up to three operations inside each other, three seeds
each with so many memory tokens; without carry a loop has nothing to go on from, which is one loop.
Every model is asked expressions of depth 1 to 7, for as many loops as in training and, with
carry, for twice as many. A queue that outlives an interruption by whole trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.jobs import Found, Study, run_study, where
from valkyrie_core import Recipe, runs
from valkyrie_core.allocate.statistics import mean_of
from valkyrie_core.data.dataset import prepare
from valkyrie_core.data.readers.questions import QuestionsCorpus
from valkyrie_core.evaluate.rules import full_depth
from valkyrie_core.evaluate.thinking import think

CORPUS = "expression"
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
    return run_study(STUDY, arguments)


def deeper(recipe: Recipe) -> Recipe:
    """The recipe with questions of all depths; none of them is trained on."""
    corpus = recipe.data.corpora[CORPUS]
    assert isinstance(corpus, QuestionsCorpus)
    task = corpus.task.model_copy(update={"depths": DEPTHS})
    asked = {"task": task, "examples": 1, "validation_examples": ASKED * len(DEPTHS)}
    data = {"corpora": {CORPUS: corpus.model_copy(update=asked)}}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


def _train(arm: str, recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.runs_dir, recipe.name)
    report = runs.train(recipe, resume=(folder / "recipe.json").exists())
    return {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "by_loops": asked(folder, carries=ARMS[arm].carries),
    }


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


def table(found: Sequence[Found]) -> str:
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
    whole = len(found) == len(ARMS) * len(STUDY.seeds)
    lines += [
        "",
        f"Trained to depth 3; means over the seeds; one thread, {where(found)}."
        + ("" if whole else " **Partial: more seeds to come.**"),
    ]
    return "\n".join(lines)


STUDY = Study(
    name="nested",
    about=__doc__.splitlines()[0],
    recipe="nested",
    arms=ARMS,
    overrides=lambda arm: ARMS[arm].overrides,
    train=_train,
    page="reasoning.md",
    tables=lambda found: {"nested": table(found)},
)


if __name__ == "__main__":
    raise SystemExit(main())
