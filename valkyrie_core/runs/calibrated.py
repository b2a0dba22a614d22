"""The threshold that `valkyrie calibrate` keeps in a run."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from pydantic import ValidationError

from valkyrie_core.config import Config
from valkyrie_core.evaluate.rules import Rule
from valkyrie_core.train.checkpoint import Checkpoint
from valkyrie_core.train.manifest import MANIFEST

log = logging.getLogger("valkyrie")

FILE = "calibration.json"


class Calibrated(Config):
    """What was promised of which weights."""

    checkpoint: str
    """Hash of the manifest of the checkpoint that was calibrated."""
    rule: Rule | None
    """None: no threshold holds, and full depth is kept."""
    risk: float
    delta: float


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Of a checkpoint: its manifest has the hash of every file."""
    return hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()


def read_calibrated(run: Path, checkpoint: Checkpoint) -> Calibrated | None:
    """What was calibrated for these weights; None, and said, where it was for others."""
    try:
        found = Calibrated.model_validate_json((run / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("%s can't be read, and full depth is kept: %s", run / FILE, error)
        return None
    if found.checkpoint != checkpoint_hash(checkpoint):
        log.warning(
            "%s was calibrated for other weights: full depth is kept until it is done again", run
        )
        return None
    return found
