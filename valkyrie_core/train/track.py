"""Mirrors of the metrics in TensorBoard, Trackio or Weights & Biases."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from valkyrie_core.errors import MissingError

if TYPE_CHECKING:
    from valkyrie_core.train.config import TensorBoardConfig, TrackioConfig, WandbConfig


class Tracker(Protocol):
    """Somewhere that numbers are sent to as they appear."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of a step, by name (`train/loss`)."""
        ...

    def close(self) -> None:
        """Flush and finish."""
        ...


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row under the names that trackers show."""
    kind, values = row["kind"], {}
    for name, value in row.items():
        if isinstance(value, dict):
            values.update({f"{kind}/{name}/{key}": float(number) for key, number in value.items()})
        elif isinstance(value, int | float) and name != "step":
            values[f"{kind}/{name}"] = float(value)
    return values


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run's directory."""

    def __init__(self, directory: Path, *, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        # purge_step hides what an interrupted sitting wrote after its checkpoint
        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and finish."""
        self._writer.close()


class TrackioTracker:
    """A Trackio run, kept in its local database."""

    def __init__(self, config: TrackioConfig, *, run: str, recipe: dict[str, Any]) -> None:
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio") from error
        self._trackio: Any = trackio
        trackio.init(project=config.project, name=run, config=recipe, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of a step."""
        self._trackio.log(values, step=step)

    def close(self) -> None:
        """Flush and finish."""
        self._trackio.finish()


class WandbTracker:
    """A Weights & Biases run."""

    def __init__(
        self, config: WandbConfig, directory: Path, *, run: str, recipe: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._run: Any = wandb.init(
            project=config.project,
            name=run,
            id=run,
            mode=config.mode,
            dir=str(directory),
            config=recipe,
            resume="allow",
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Flush and finish."""
        self._run.finish()


def build_tracker(
    config: TensorBoardConfig | TrackioConfig | WandbConfig | None,
    directory: Path,
    *,
    recipe: dict[str, Any],
    first_step: int,
) -> Tracker | None:
    """The tracker that a recipe names; MissingError where its package is not installed."""
    if config is None:
        return None
    if config.type == "tensorboard":
        return TensorBoardTracker(directory, first_step=first_step)
    if config.type == "trackio":
        return TrackioTracker(config, run=directory.name, recipe=recipe)
    return WandbTracker(config, directory, run=directory.name, recipe=recipe)


def require_tracker(config: TensorBoardConfig | TrackioConfig | WandbConfig | None) -> None:
    """Raises MissingError where the package that a recipe's tracker needs is not installed."""
    if config is not None and find_spec(config.type) is None:
        raise _missing(config.type)


def _missing(package: str) -> MissingError:
    return MissingError(
        f"the recipe's train.track needs {package}, which is not installed",
        hint="pip install 'valkyrie-lab[track]'",
    )
