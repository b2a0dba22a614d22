"""Routers among mixers in training: they grow hard, and pay for their operations.

Both happen between steps: what a batch takes never changes how its own tokens are routed.
"""

from __future__ import annotations

from torch import Tensor

from valkyrie_core.nn.backbone import Told
from valkyrie_core.nn.models import Model
from valkyrie_core.nn.routed import RoutedMixer

Row = dict[str, dict[str, float | dict[str, float]]]


class MixerRouting:
    """The routers among mixers of one model."""

    def __init__(self, model: Model) -> None:
        self._layers = {
            index: layer.mixer
            for index, layer in enumerate(model.core.layers)
            if isinstance(layer.mixer, RoutedMixer)
        }
        self._passes = [index for index in model.core.passes if index in self._layers]
        self._used: dict[int, Tensor] = {}
        self.row: Row = {}
        """Of the last step, by layer: the share of tokens that went through each mixer, the
        operations of all, and their price."""

    def restart(self, done: float) -> None:
        """A step begins, after a share of all of them."""
        self._used = {}
        for layer in self._layers.values():
            layer.anneal(done)

    def add(self, told: Told, share: float) -> None:
        """Counts a micro-batch that is a share of the step."""
        for index, route in zip(self._passes, told.routes, strict=True):
            # a layer that is looped is charged for the mean of its loops
            own_M = route.shares_M * share / self._passes.count(index)
            self._used[index] = self._used[index] + own_M if index in self._used else own_M

    def finish(self) -> None:
        """Moves prices by what the step took."""
        self.row = {}
        for index, used_M in self._used.items():
            layer = self._layers[index]
            operations = layer.charge(used_M.tolist())
            shares = dict(zip(layer.names, map(float, used_M), strict=True))
            self.row[str(index)] = {
                "share": shares,
                "operations": operations,
                "price": float(layer.price),
            }
