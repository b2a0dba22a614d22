"""Which mixers track a state, and how far beyond the length that they were trained at.

    python -m benchmarks.tracking               # trains what is missing, writes table and picture
    python -m benchmarks.tracking --tables      # only writes docs/state_tracking.md anew

The recipe `tracking` on three groups, with attention, RWKV-7 and RWKV-7 with signed eigenvalues,
each once and looped twice, three seeds each. All are trained on rows of 32 elements, and asked rows
of 32, 64 and 128. A queue that outlives an interruption by whole trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import result
from benchmarks.jobs import Found, Study, run_study, where
from valkyrie_core import Recipe, runs
from valkyrie_core.allocate.statistics import mean_of

MIXERS = {
    "attention": ("attention", "{type: attention, num_heads: 4}"),
    "positive": ("RWKV-7", "{type: rwkv7, head_dim: 32}"),
    "signed": ("RWKV-7, signed", "{type: rwkv7, head_dim: 32, eigenvalues: signed}"),
}
GROUPS = {"parity": ("parity", 2), "s3": ("S3", 6), "a5": ("A5", 60)}
"""Titles, and how many elements there are."""
ELEMENTS = {"parity": "all", "s3": "all", "a5": "generators"}
"""What rows are made of: the 3600 products of two elements of A5 take longer to learn."""
LOOPS = (1, 2)
LENGTHS = (32, 64, 128)
TRAINED = 32
PICTURE = result.ROOT / "docs" / "state_tracking.png"
_COLOURS = {"attention": "#4c72b0", "positive": "#dd8452", "signed": "#c44e52"}


class Arm(NamedTuple):
    """What is trained."""

    group: str
    mixer: str
    loops: int

    @property
    def overrides(self) -> list[str]:
        """Of the recipe."""
        tasks = [f"data.corpora.words.{task}" for task in ("task", "validation_task")]
        return [
            *(f"{task}.group={self.group}" for task in tasks),
            *(f"{task}.elements={ELEMENTS[self.group]}" for task in tasks),
            f"model.core.blocks.layer.mixer={MIXERS[self.mixer][1]}",
            f"model.core.loops={self.loops}",
        ]


ARMS = {
    f"{group}_{mixer}_{loops}": Arm(group, mixer, loops)
    for group in GROUPS
    for mixer in MIXERS
    for loops in LOOPS
}


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, then writes the page."""
    return run_study(STUDY, arguments)


def _train(_arm: str, recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.runs_dir, recipe.name)
    report = runs.train(recipe, resume=(folder / "recipe.json").exists())
    accuracy = runs.evaluate(folder).corpora["words"].accuracy
    assert accuracy is not None
    return {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "by_length": accuracy.by_difficulty,
    }


def _tables(found: Sequence[Found]) -> dict[str, str]:
    PICTURE.write_bytes(draw(found))
    return {"tracking": table(found)}


def _of(found: Sequence[Found], arm: Arm) -> list[Mapping[str, float]]:
    return [one["by_length"] for one in found if ARMS[one["arm"]] == arm]


def table(found: Sequence[Found]) -> str:
    """The share of right answers, by group and length."""
    heads = [f"{title}, {length}" for title, _ in GROUPS.values() for length in LENGTHS]
    lines = [f"| mixer | loops | {' | '.join(heads)} |", "|---|---:" + "|---:" * len(heads) + "|"]
    for mixer, (title, _) in MIXERS.items():
        for loops in LOOPS:
            cells = []
            for group in GROUPS:
                own = _of(found, Arm(group, mixer, loops))
                cells += [_cell([one[str(length)] for one in own]) for length in LENGTHS]
            lines.append(f"| {title} | {loops} | {' | '.join(cells)} |")
    chance = ", ".join(f"{title} {1 / size:.0%}" for title, size in GROUPS.values())
    seeds = {one["seed"] for one in found}
    whole = len(found) == len(ARMS) * len(STUDY.seeds)
    lines += [
        "",
        f"![right answers by length]({PICTURE.name})",
        "",
        f"Right answers: the mean over {len(seeds)} seeds, and in brackets the worst. By chance: "
        f"{chance}. Trained at length {TRAINED}; {_sizes(found)} parameters; one thread, "
        f"{where(found)}." + ("" if whole else " **Partial: more to come.**"),
    ]
    return "\n".join(lines)


def _sizes(found: Sequence[Found]) -> str:
    sizes = [one["parameters"] for one in found]
    return f"{min(sizes):,} to {max(sizes):,}"


def _cell(shares: Sequence[float]) -> str:
    return f"{mean_of(list(shares)).value:.0%} ({min(shares):.0%})" if shares else "-"


def draw(found: Sequence[Found]) -> bytes:
    """A PNG, one panel a group: right answers by length, every seed and the mean."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 11}):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(GROUPS), sharey=True)
        for axis, (group, (title, size)) in zip(axes, GROUPS.items(), strict=True):
            for mixer, (name, _) in MIXERS.items():
                for loops in LOOPS:
                    own = _of(found, Arm(group, mixer, loops))
                    if not own:
                        continue
                    means = [sum(one[str(length)] for one in own) / len(own) for length in LENGTHS]
                    style = "-" if loops > 1 else "--"
                    label = f"{name}, {loops} loop{'s' * (loops > 1)}"
                    axis.plot(LENGTHS, means, style, color=_COLOURS[mixer], label=label)
                    for one in own:
                        shares = [one[str(length)] for length in LENGTHS]
                        axis.plot(LENGTHS, shares, "o", color=_COLOURS[mixer], alpha=0.3)
            axis.axhline(1 / size, color="#999999", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
            axis.set_xlabel("length of the row")
            axis.set_title(f"{title} ({size} elements)", fontsize=11)
            axis.set_ylim(0, 1.03)
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("right answers")
        # a mixer that is missing in one panel may be in another
        told = {
            label: handle
            for axis in axes
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(told.values(), told.keys(), loc="outside right center", frameon=False)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


STUDY = Study(
    name="tracking",
    about=__doc__.splitlines()[0],
    recipe="tracking",
    arms=ARMS,
    overrides=lambda arm: ARMS[arm].overrides,
    train=_train,
    page="state_tracking.md",
    tables=_tables,
)


if __name__ == "__main__":
    raise SystemExit(main())
