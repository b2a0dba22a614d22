"""The state of every random number generator, as tensors and JSON: no pickle."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from valkyrie_core.errors import CheckpointError

_NUMPY_KIND = "MT19937"


class RngState(NamedTuple):
    """A snapshot of the global generators of torch, Python and numpy."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @classmethod
    def capture(cls) -> RngState:
        """The generators as they stand; torch's on every CUDA device too."""
        version, words, gauss = random.getstate()
        legacy = np.random.get_state(legacy=False)
        assert isinstance(legacy, dict)
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, dtype=torch.int64),
            "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        }
        if torch.cuda.is_available():
            for i, state in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"cuda{i}"] = state
        meta = {
            "python_version": version,
            "python_gauss": gauss,
            "numpy_kind": legacy["bit_generator"],
            "numpy_position": int(legacy["state"]["pos"]),
            "numpy_has_gauss": int(legacy["has_gauss"]),
            "numpy_gauss": float(legacy["gauss"]),
        }
        return cls(tensors, meta)

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.tensors["torch"])
        if torch.cuda.is_available():
            for i in range(torch.cuda.device_count()):
                if f"cuda{i}" in self.tensors:
                    torch.cuda.set_rng_state(self.tensors[f"cuda{i}"], i)
        words = tuple(int(word) for word in self.tensors["python"])
        random.setstate((self.meta["python_version"], words, self.meta["python_gauss"]))
        np.random.set_state(
            {
                "bit_generator": self.meta["numpy_kind"],
                "state": {
                    "key": self.tensors["numpy"].numpy().astype(np.uint32),
                    "pos": self.meta["numpy_position"],
                },
                "has_gauss": self.meta["numpy_has_gauss"],
                "gauss": self.meta["numpy_gauss"],
            }
        )

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> RngState:
        """The snapshot that a checkpoint holds."""
        missing = {"torch", "python", "numpy"} - tensors.keys()
        if missing or meta.get("numpy_kind") != _NUMPY_KIND:
            raise CheckpointError(f"the checkpoint lacks generator states: {sorted(missing)}")
        return cls(dict(tensors), dict(meta))
