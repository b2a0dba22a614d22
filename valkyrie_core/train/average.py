"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from valkyrie_core.errors import CheckpointError


class Average:
    """The average of a model's parameters; buffers are used as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay` is the share of the average that stays at a step, once it is old enough."""
        self._decay = decay
        self._parameters = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {}
        """The averages, by the parameters' names."""
        self.restart()

    def restart(self) -> None:
        """The weights as they are now are the average."""
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as they are after step `step`, from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self.tensors.items():
            average.lerp_(self._parameters[name].detach(), 1 - decay)

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """What the model has now is the average, and its weights are those that were trained."""
        if trained.keys() != self.tensors.keys():
            raise CheckpointError(
                "the checkpoint has no weights beside their average: it was trained without ema"
            )
        self.restart()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(trained[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages while this lasts."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(trained)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
