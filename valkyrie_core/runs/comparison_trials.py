"""The trainings of a comparison, one after the other, and what they score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from valkyrie_core.compare.contenders import Contender, design_hash
from valkyrie_core.compare.curves import curve_of
from valkyrie_core.compare.matching import Trial, trials
from valkyrie_core.compare.scores import scores_of
from valkyrie_core.errors import DivergedError, ValkyrieError
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.recipe import Recipe
from valkyrie_core.report import TrainReport
from valkyrie_core.runs.comparison_report import Trained
from valkyrie_core.runs.training import train_recipe
from valkyrie_core.train.checkpoint import step_directory
from valkyrie_core.train.device import resolve_device, resolve_precision
from valkyrie_core.train.progress import StepEvent

log = logging.getLogger("valkyrie")

SCORES = "scores"
Begin = Callable[[str, int, int, float], Callable[[StepEvent], None]]
"""Told of a training that begins: its name, its number from 1, how many there are, and seconds that
all the rest takes; gives what is told of its steps."""
Reading = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrialRunner:
    """Trains and scores whatever is not there."""

    reference: str
    """The design that others are set against."""
    folder: Path
    """Of the comparison."""
    runs_dir: str
    """Where runs live; trainings go into a folder of it."""
    text: str
    """Fingerprint of what is read."""
    tokens: int
    """Of each corpus, that are scored."""
    context_len: int
    precision: Precision
    """In which all are scored."""
    speed: Mapping[str, float]
    """Seconds of a step, by design."""
    begin: Begin
    reading: Reading | None
    command: str
    """What goes on where a training was stopped."""

    def run(
        self,
        designs: Sequence[Contender],
        recipes: Mapping[str, Recipe],
        seeds: range,
        *,
        later: float = 0.0,
    ) -> tuple[dict[str, list[Trained]], dict[str, str]]:
        """What every design scores, by seed; and what was said of those that diverged instead.

        A design that diverges is trained no more.

        Args:
            recipes: by design; others are left out.
            later: seconds of trainings that come after these.

        Raises DivergedError where the reference diverges, or all others do.
        """
        todo = trials(recipes, designs, seeds, self.runs_dir, self.text)
        reports, diverged = self._train_all(todo, {one.name: one for one in designs}, later)
        names = [one.name for one in designs if one.name not in diverged]
        done = {
            name: [
                self._scored(trial, reports[index])
                for index, trial in enumerate(todo)
                if trial.contender == name
            ]
            for name in names
        }
        return done, diverged

    def _train_all(
        self, todo: Sequence[Trial], sources: Mapping[str, Contender], later: float
    ) -> tuple[dict[int, TrainReport], dict[str, str]]:
        """Reports by the number of the trial."""
        found = {
            index: report
            for index, trial in enumerate(todo)
            if (report := _finished(trial, sources[trial.contender], self.text)) is not None
        }
        missing = [index for index in range(len(todo)) if index not in found]
        diverged: dict[str, str] = {}
        for number, index in enumerate(missing, 1):
            trial = todo[index]
            if trial.contender in diverged:
                continue
            ahead = later + sum(
                todo[one].recipe.train.steps * self.speed[todo[one].contender]
                for one in missing[number - 1 :]
                if todo[one].contender not in diverged
            )
            shown = f"{trial.contender}, seed {trial.seed}"
            progress = self.begin(shown, number, len(missing), ahead)
            try:
                found[index] = self._train(trial, progress)
            except DivergedError as error:
                others = {one.contender for one in todo} - {self.reference, *diverged}
                if trial.contender == self.reference or others == {trial.contender}:
                    raise DivergedError(
                        f"{shown}: {error.message}",
                        hint="a design that diverges can't be compared: lower its rate",
                    ) from error
                # no step is told: where it was last saved is an accident
                diverged[trial.contender] = f"its training with seed {trial.seed} diverged"
                log.warning("%s is dropped: %s", shown, error.message)
        return found, diverged

    def _train(self, trial: Trial, progress: Callable[[StepEvent], None]) -> TrainReport:
        return train_recipe(
            trial.recipe,
            # a folder without it was stopped before its first step
            resume=Path(trial.recipe.runs_dir, trial.recipe.name, "recipe.json").is_file(),
            steps=None,
            extend_steps=None,
            progress=progress,
            resume_command=self.command,
        )

    def _scored(self, trial: Trial, report: TrainReport) -> Trained:
        scores = scores_of(
            Path(report.directory),
            report.steps,
            self.tokens,
            self.folder / SCORES / f"{trial.recipe.name}.json",
            text=self.text,
            context_len=self.context_len,
            precision=self.precision,
            progress=self.reading,
        )
        return Trained(trial, report, scores, curve_of(Path(report.directory)))


def _finished(trial: Trial, source: Contender, text: str) -> TrainReport | None:
    """What a finished training of the same design, text and seed reported: its own, or the
    user's run."""
    usual = Path(trial.recipe.runs_dir).parent / source.recipe.name
    device = resolve_device(trial.recipe.device)
    precision = resolve_precision(trial.recipe.train.precision, device)
    for place in (Path(trial.recipe.runs_dir, trial.recipe.name), source.run or usual):
        try:
            recorded = Recipe.from_json(place / "recipe.json")
            report = TrainReport.model_validate_json((place / "report.json").read_bytes())
        except (ValkyrieError, OSError, ValueError):
            continue
        same = design_hash(recorded) == design_hash(trial.recipe) and recorded.seed == trial.seed
        same &= (report.data_fingerprint, report.precision) == (text, precision)
        whole = report.finished and report.steps == trial.recipe.train.steps
        if same and whole and step_directory(place / "checkpoints", report.steps).is_dir():
            # a run that was moved since lies where it was found
            return report.model_copy(update={"directory": str(place)})
    return None
