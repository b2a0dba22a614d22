"""One sitting of a training: decides where it starts and stops, then lets the Trainer work."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from valkyrie_core.data.batch import BatchStream
from valkyrie_core.data.dataset import Dataset
from valkyrie_core.errors import CheckpointError, MissingError, RecipeError, StoppedError, UsageError
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.checkpoint import (
    Checkpoint,
    newest_valid,
    remove_leftovers,
    set_aside,
)
from valkyrie_core.train.device import resolve_device, resolve_precision
from valkyrie_core.train.load import find_checkpoint, load_weights_from
from valkyrie_core.train.progress import StepEvent, Validation
from valkyrie_core.train.run_dir import RunDir, describe_environment
from valkyrie_core.train.schedule import Extension, LRPlan
from valkyrie_core.train.signals import StopRequestedError, StopSignal
from valkyrie_core.train.storage import Storage
from valkyrie_core.train.track import build_tracker
from valkyrie_core.train.trainer import Poll, Tools, Trainer
