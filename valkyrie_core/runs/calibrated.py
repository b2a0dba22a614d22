"""The threshold that `valkyrie calibrate` keeps in a run."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from pydantic import ValidationError

from valkyrie_core.config import Config
from valkyrie_core.nn.halting import ConfidenceConfig
from valkyrie_core.train.checkpoint import Checkpoint
from valkyrie_core.train.manifest import MANIFEST

log = logging.getLogger("valkyrie")

FILE = "calibration.json"


class Calibrated(Config):
    """What was promised of which weights."""

    checkpoint: str
    """Hash of the manifest of the checkpoint that was calibrated."""
    precision: str
    """What was computed in."""
    rule: ConfidenceConfig | None
    """None: no threshold holds, and full depth is kept."""
    risk: float
    delta: float


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Of a checkpoint: its manifest has the hash of every file."""
    return hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()


def read_calibrated(run: Path, checkpoint: Checkpoint) -> Calibrated | None:
    """What was calibrated for these weights; None, and said, where it was for others."""
    again = f"the recipe's own rule ends thought, without a promise; valkyrie calibrate {run}"
    try:
        found = Calibrated.model_validate_json((run / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        log.warning("%s can't be read: %s", run / FILE, again)
        return None
    if found.checkpoint != checkpoint_hash(checkpoint):
        log.warning("%s was calibrated for other weights: %s", run, again)
        return None
    return found
