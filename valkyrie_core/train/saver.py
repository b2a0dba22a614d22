"""What a training checkpoint holds, and how a training is put back where it stood."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from valkyrie_core.train.average import Average
from valkyrie_core.train.checkpoint import (
    MODEL,
    Checkpoint,
    prune,
    save_checkpoint,
    step_directory,
    verify,
)
from valkyrie_core.train.optim import Optimizers
from valkyrie_core.train.progress import Position
from valkyrie_core.train.rng import RngState
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.schedule import Extension
from valkyrie_core.train.weights import load_model_tensors, model_tensors

log = logging.getLogger("valkyrie")


class Saver:
    """Saves and restores one training: weights, optimizer state, generators, counters.

    `binding` is stored in every checkpoint: fingerprints and whatever must agree on resume.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        model: nn.Module,
        optimizers: Optimizers,
        extensions: Sequence[Extension],
        keep_last: int,
        binding: Mapping[str, Any],
        average: Average | None = None,
    ) -> None:
        """With an average of the weights, that is what a checkpoint's model is."""
        self._run = run
        self._model = model
        self._average = average
        self._optimizers = optimizers
        self._extensions = [extension._asdict() for extension in extensions]
        self._keep_last = keep_last
        self._binding = dict(binding)
        self.saved: tuple[int, int] | None = None
        """(step, last validation) of the newest checkpoint."""

    def save(self, position: Position, carried: Mapping[str, Tensor]) -> None:
        """Write a checkpoint of this moment, then remove those that are kept no longer.

        `carried` are the states that the next step goes on from, as tensors.
        """
        rng = RngState.capture()
        training = {f"optimizer/{key}": t for key, t in self._optimizers.state_tensors().items()}
        training |= {f"rng/{name}": tensor for name, tensor in rng.tensors.items()}
        training |= {f"carried/{name}": tensor for name, tensor in carried.items()}
        model = model_tensors(self._model)
        if self._average is not None:
            training |= {f"trained/{name}": model[name] for name in self._average.tensors}
            model |= self._average.tensors
        meta = {
            **self._binding,
            "position": position.to_meta(),
            "rng": rng.meta,
            "extensions": self._extensions,
        }
        save_checkpoint(
            self._run.checkpoints,
            position.step,
            model=model,
            training=training,
            meta=meta,
            storage=self._run.storage,
        )
        self.saved = (position.step, position.validated)
        prune(
            self._run.checkpoints,
            keep_last=self._keep_last,
            keep_steps=[] if position.best_step is None else [position.best_step],
            storage=self._run.storage,
        )

    def read_back(self, step: int) -> Checkpoint:
        """The checkpoint of `step` from the disk, verified; warns where the disk is too small."""
        checkpoint = verify(step_directory(self._run.checkpoints, step))
        # weights and their moments, for all that will be kept and one being written
        size = (1 + self._optimizers.moments) * (checkpoint.path / MODEL).stat().st_size
        needed, free = size * (self._keep_last + 2), shutil.disk_usage(self._run.path).free
        if free < needed:
            log.warning(
                "checkpoints will take up to %.1f GB, and %s has %.1f GB left",
                needed / 1e9,
                self._run.path,
                free / 1e9,
            )
        return checkpoint

    def restore(self, checkpoint: Checkpoint) -> tuple[Position, dict[str, Tensor]]:
        """Put weights, optimizer and generators back; returns the counters and what was carried."""
        load_model_tensors(self._model, checkpoint.model_tensors(), str(checkpoint.path))
        training = dict(checkpoint.training_tensors())
        if self._average is not None:
            self._average.restore(_below("trained/", training))
        self._optimizers.load_state_tensors(_below("optimizer/", training))
        position = Position.from_meta(checkpoint.meta["position"])
        self.saved = (position.step, position.validated)
        RngState.from_parts(_below("rng/", training), checkpoint.meta["rng"]).restore()
        return position, _below("carried/", training)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
