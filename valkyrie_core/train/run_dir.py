"""The directory of one run: what lies where, who may write, what the run has become.

runs/NAME/recipe.json        the resolved recipe, as the run was started
          environment.json   versions, threads, device, fingerprints, one entry per sitting
          extensions.json    what --extend-steps added, if anything
          metrics.jsonl      one row per logged step, validation and sample
          curves.png samples.md report.json
          tokenizer/         what the weights are bound to
          checkpoints/step-N/
          lock lock.json     held while a process trains; who that is
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from valkyrie_core.errors import MissingError, ResourceError, RunInUseError
from valkyrie_core.machine.hardware import environment
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.checkpoint import list_checkpoints
from valkyrie_core.train.schedule import Extension
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")


class RunDir:
    """A run's directory; making the object touches nothing."""

    def __init__(self, path: Path, storage: Storage | None = None) -> None:
        self.path = path
        self.storage = storage or Storage()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe, as JSON."""
        return self.path / "recipe.json"

    @property
    def environment_file(self) -> Path:
        """Versions and machine of every sitting."""
        return self.path / "environment.json"

    @property
    def extensions_file(self) -> Path:
        """What --extend-steps added."""
        return self.path / "extensions.json"

    @property
    def metrics_file(self) -> Path:
        """Rows of JSON."""
        return self.path / "metrics.jsonl"

    @property
    def report_file(self) -> Path:
        """The report of the training, once it ended."""
        return self.path / "report.json"

    @property
    def curves_file(self) -> Path:
        """Loss, validation and learning rate as a picture."""
        return self.path / "curves.png"

    @property
    def samples_file(self) -> Path:
        """Continuations of the recipe's prompts."""
        return self.path / "samples.md"

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer that the weights are bound to."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints live."""
        return self.path / "checkpoints"

    def create(self) -> None:
        """Make the directories; ResourceError where that can't be done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"the run's directory {self.path} can't be made: {error.strerror}",
                hint="choose a place that can be written with --set runs_dir=DIRECTORY",
            ) from error

    def has_checkpoints(self) -> bool:
        """Whether training ever got as far as its first checkpoint, intact or not."""
        return bool(list_checkpoints(self.checkpoints))

    def load_recipe(self) -> Recipe:
        """The recipe as the run was started; MissingError where it is gone or unreadable."""
        try:
            return Recipe.model_validate_json(self.recipe_file.read_bytes())
        except OSError as error:
            raise MissingError(
                f"{self.path} is not a run: it has no recipe.json",
                hint="`valkyrie runs list` shows the runs",
            ) from error
        except ValidationError as error:
            raise MissingError(f"{self.recipe_file} can't be read: {error}") from error

    def stored_recipe(self) -> dict[str, Any]:
        """recipe.json as it stands, with the keys of the version that wrote it."""
        stored: dict[str, Any] = json.loads(self.recipe_file.read_bytes())
        return stored

    def save_recipe(self, recipe: Recipe) -> None:
        """Store the resolved recipe."""
        self.storage.replace_json(self.recipe_file, recipe.model_dump(mode="json"))

    def load_extensions(self) -> tuple[Extension, ...]:
        """What --extend-steps added so far."""
        if not self.extensions_file.exists():
            return ()
        try:
            entries = json.loads(self.extensions_file.read_bytes())
            return tuple(Extension(int(entry["start"]), int(entry["steps"])) for entry in entries)
        except (ValueError, KeyError, TypeError):
            # checkpoints hold the list too
            log.warning("%s can't be read and is passed over", self.extensions_file)
            return ()

    def save_extensions(self, extensions: Sequence[Extension]) -> None:
        """Store what --extend-steps added."""
        entries = [extension._asdict() for extension in extensions]
        self.storage.replace_json(self.extensions_file, entries)

    def save_environment(self, sitting: dict[str, Any]) -> None:
        """Describe this process and this sitting; what earlier sittings said is kept."""
        sittings: list[Any] = []
        if self.environment_file.exists():
            try:
                sittings = json.loads(self.environment_file.read_bytes())["sittings"]
            except (ValueError, KeyError, TypeError):
                sittings = [{"note": "earlier entries were not readable"}]
        now = {"started": _now(), "host": socket.gethostname(), "pid": os.getpid(), **sitting}
        self.storage.replace_json(
            self.environment_file, {**environment(), "sittings": [*sittings, now]}
        )

    @contextmanager
    def lock(self, command: str) -> Iterator[None]:
        """Hold the run for writing; RunInUseError names who else does.

        The system frees the lock when the process ends, however it ends.
        """
        lock = FileLock(self.path / "lock", blocking=False)
        owner_file = self.path / "lock.json"
        try:
            lock.acquire()
        except Timeout:
            raise RunInUseError(
                f"the run {self.name} is in use: {_read_owner(owner_file)}",
                hint="wait for it, stop it, or choose another name with --set name=NEW",
            ) from None
        try:
            owner = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": _now(),
                "command": command,
            }
            self.storage.replace_json(owner_file, owner)
            yield
        finally:
            owner_file.unlink(missing_ok=True)
            lock.release()


def _read_owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        return (
            f"process {owner['pid']} on {owner['host']} writes to it since {owner['since']} "
            f"({owner['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        # the other process holds the lock but has not yet written, or lost, its card
        return "another process writes to it"


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")
