"""What routers did over a whole batch, fed back into them once its step is done.

Loads are summed over a step's micro-batches. Biases move, and starved experts are replaced, after
the optimizer's step: the present batch never decides where its own tokens go. Only training comes
by here, so that an evaluation moves nothing; and what a layer says is taken from its first pass, so
that one that is computed again in the backward pass does not count twice.

Shapes: E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from valkyrie_core.nn.backbone import Told
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.moe.layer import MoE
from valkyrie_core.train.mixer_routing import MixerRouting
from valkyrie_core.train.optim import Optimizers
from valkyrie_core.train.progress import Health

DEAD_SHARE = 0.1
"""An expert with less than this share of a fair load counts as dead."""


class Revival(NamedTuple):
    """One expert that was replaced by a copy of another."""

    layer: int
    expert: int
    source: int


class Routing:
    """The routers of one model in training."""

    def __init__(self, model: Model, optimizers: Optimizers) -> None:
        self._layers = {
            index: layer.ffn
            for index, layer in enumerate(model.core.layers)
            if isinstance(layer.ffn, MoE)
        }
        self._passes = [index for index in model.core.passes if index in self._layers]
        self._optimizers = optimizers
        self.mixers = MixerRouting(model)
        self._loads: list[Tensor] = []
        self.loads: dict[int, list[int]] = {}
        """Tokens of the last step by layer and expert."""
        self.losses: dict[str, float] = {}
        """Auxiliary losses of the last step by name, as they were added."""

    def restart(self, done: float = 0.0) -> None:
        """Forgets what was added: a step begins, after a share of all of them."""
        self._loads, self.losses = [], {}
        self.mixers.restart(done)

    def add(self, told: Told, share: float) -> float:
        """Counts a micro-batch that is a share of the step; returns its auxiliary losses' sum."""
        loads = [one.load_E for one in told.routed]
        before = self._loads or [torch.zeros_like(load) for load in loads]
        self._loads = [a + b for a, b in zip(before, loads, strict=True)]
        self.mixers.add(told, share)
        added = {name: float(value.detach()) for name, value in told.aux.items()}
        for name, value in added.items():
            self.losses[name] = self.losses.get(name, 0.0) + value * share
        return sum(added.values())

    def finish(self, scale: float) -> list[Revival]:
        """Moves biases and replaces starved experts by the loads of the step that is done.

        Args:
            scale: of the learning rates in this step; biases move with them, and settle with them.
        """
        self.mixers.finish()
        revivals = []
        left = list(self._loads)
        found: dict[int, list[list[Tensor]]] = {index: [] for index in self._layers}
        for index in self._passes:
            rounds = self._layers[index].config.rounds
            found[index].append(left[:rounds])
            left = left[rounds:]
        for index, moe in self._layers.items():
            # a layer that is looped is balanced over all its loops
            loads = [torch.stack(own).sum(0) for own in zip(*found[index], strict=True)]
            moe.balance_by(loads, scale)
            load_E = torch.stack(loads).sum(0)
            self.loads[index] = [int(count) for count in load_E]
            for expert, source in moe.revive(load_E):
                for parameter in moe.rows_of_experts():
                    self._optimizers.forget(parameter, expert)
                revivals.append(Revival(index, expert, source))
        assert not left
        return revivals

    def health(self) -> Health | None:
        """Of the last step; None for a model without experts."""
        if not self.loads:
            return None
        loads = [torch.tensor(load, dtype=torch.float64) for load in self.loads.values()]
        return Health(max(map(max_vio, loads)), sum(num_dead(load) for load in loads))


def max_vio(load_E: Tensor) -> float:
    """The largest load over the mean load, less 1: 0 where all are alike (arXiv 2408.15664)."""
    mean = float(load_E.mean())
    return float(load_E.max()) / mean - 1 if mean else 0.0


def num_dead(load_E: Tensor) -> int:
    """Experts with less than a tenth of a fair load."""
    return int((load_E < DEAD_SHARE * load_E.mean()).sum())
