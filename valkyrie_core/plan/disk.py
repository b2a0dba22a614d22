"""How large a checkpoint is, before one is written: what `train.saver` saves, file by file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from valkyrie_core.plan.trace import Training
from valkyrie_core.recipe import Recipe
from valkyrie_core.train.progress import Position
from valkyrie_core.train.rng import RngState

BINDING_BYTES = 1 << 10
"""Of fingerprints, versions and the manifest: about so much, whatever the model."""
_NAMES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "int64": "I64", "uint8": "U8"}


class Disk(NamedTuple):
    """Bytes of checkpoints."""

    checkpoint: int
    """One, from the first step on: weights, optimizer, generators, counters."""
    carried: int
    """What states that go on from step to step add, at most (`train.state_passing`)."""
    kept: int
    """How many there are at one time: the newest, the best one, and one that is being written."""

    @property
    def total(self) -> int:
        """What they take together, at most."""
        return self.kept * (self.checkpoint + self.carried)


def checkpoint_size(training: Training) -> Disk:
    """The checkpoints of a training."""
    meta = json.dumps({"position": Position().to_meta(), "rng": RngState.capture().meta})
    carried = sum(x.numel() * x.element_size() for x in training.carried_tensors().values())
    size = sum(_tensor_files(training)) + len(meta) + BINDING_BYTES
    return Disk(size, carried, kept(training.recipe))


def kept(recipe: Recipe) -> int:
    """How many checkpoints there are at one time."""
    return recipe.train.keep_last + 2


def _tensor_files(training: Training) -> tuple[int, int]:
    weights, saved = training.tensors()
    saved |= {f"rng/{name}": tensor for name, tensor in RngState.capture().tensors.items()}
    return file_size(weights), file_size(saved)


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file: eight of a length, a header in JSON, the tensors."""
    header: dict[str, object] = {}
    end = 0
    # the widest types first, as the library lays them out
    for name, tensor in sorted(tensors.items(), key=lambda x: (-x[1].element_size(), x[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind = str(tensor.dtype).removeprefix("torch.")
        header[name] = {
            "dtype": _NAMES.get(kind, kind),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end
