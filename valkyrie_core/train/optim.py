"""Optimizers by parameter role.

Weight decay acts on the role `matrix` alone: decaying embeddings, the head, low-rank factors or
mixing coefficients makes RWKV-7 much worse (its author's finding) and does attention no good.
The role `decay` (the RWKV-7 decay bias) learns at twice the rate, as its author trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field
from torch import Tensor, nn

from valkyrie_core.config import Config
from valkyrie_core.errors import CheckpointError
from valkyrie_core.nn.layers import Role, parameter_roles
from valkyrie_core.train.adafactor import Adafactor
from valkyrie_core.train.muon import Muon, StackedMuon

DECAY_LR_RATIO = 2.0
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps"})


class AdamWConfig(Config):
    """AdamW for every parameter; weight decay on matrices only."""

    type: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, applied to matrices only."""


class MuonConfig(Config):
    """Muon for hidden matrices, AdamW for embeddings, head, vectors and low-rank factors.

    torch.optim.Muon with Keller Jordan's own scaling, lr * sqrt(max(1, rows / columns)): the rate
    is the size of an orthogonal update and does not depend on the width (0.01 to 0.02 is usual).
    """

    type: Literal["muon"] = "muon"
    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate of Muon."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum (Nesterov)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of the matrices."""
    adamw: AdamWConfig = AdamWConfig(lr=2e-3)
    """The optimizer of everything that is not a hidden matrix."""


class AdafactorConfig(Config):
    """Adafactor for every parameter (arXiv 1804.04235): next to no memory of its own.

    Updates are relative to the size of what they change, so the rate is a share: 0.01 moves a
    matrix by a hundredth of its root mean square.
    """

    type: Literal["adafactor"] = "adafactor"
    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate; 1 / sqrt(step) where that is smaller."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """How fast the second moments come to remember: they forget step^beta2_decay of themselves."""
    least_scale: float = Field(default=1e-2, gt=0)
    """What counts as the size of a parameter that is smaller: above all of those that begin at
    zero, as output matrices do."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, applied to matrices only."""


Optimizer = Annotated[AdamWConfig | MuonConfig | AdafactorConfig, Discriminator("type")]


class Group(NamedTuple):
    """Parameters that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float


class Optimizers:
    """One or two torch optimizers that act as one, with their state under parameter names."""

    def __init__(self, parts: Sequence[tuple[torch.optim.Optimizer, Sequence[Group]]]) -> None:
        self._parts = tuple((optimizer, tuple(groups)) for optimizer, groups in parts)
        self._owners: dict[Tensor, tuple[torch.optim.Optimizer, int]] = {
            parameter: (optimizer, index)
            for optimizer, groups in self._parts
            for index, group in enumerate(groups)
            for parameter in group.parameters
        }

    @property
    def moments(self) -> int:
        """How many numbers are remembered for a weight, at most; before the first step as well."""
        kept = {Adafactor: 0, Muon: 1, StackedMuon: 1}
        return max(kept.get(type(optimizer), 2) for optimizer, _ in self._parts)

    def step(self) -> None:
        """Update every parameter from its gradient."""
        for optimizer, _ in self._parts:
            optimizer.step()

    def step_one(self, parameter: Tensor) -> None:
        """Update one parameter from its gradient, whatever others have."""
        optimizer, index = self._owners[parameter]
        whole = optimizer.param_groups
        optimizer.param_groups = [{**whole[index], "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = whole

    def forget(self, parameter: Tensor, index: int) -> None:
        """Forgets what is known of one row of a parameter, or of one matrix of a stack."""
        optimizer, _ = self._owners[parameter]
        for value in optimizer.state.get(parameter, {}).values():
            # counters of steps, and what is shared by all rows, have another shape
            if isinstance(value, Tensor) and value.shape[:1] == parameter.shape[:1]:
                value[index] = 0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer, _ in self._parts:
            optimizer.zero_grad(set_to_none=True)

    def set_lr_scale(self, scale: float) -> None:
        """Set every group's learning rate to `scale` times its peak."""
        for optimizer, groups in self._parts:
            for group, live in zip(groups, optimizer.param_groups, strict=True):
                live["lr"] = group.lr * scale

    def learning_rates(self) -> dict[str, float]:
        """The learning rate now of each optimizer's first group, by class name in lower case."""
        return {
            # matrices and stacks of them have the same rate
            type(optimizer).__name__.lower().removeprefix("stacked"): float(
                optimizer.param_groups[0]["lr"]
            )
            for optimizer, _ in self._parts
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that is optimized, by name."""
        for _, groups in self._parts:
            for group in groups:
                yield from zip(group.names, group.parameters, strict=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """All optimizer state as `parameter name/field` -> tensor; empty before the first step."""
        tensors: dict[str, Tensor] = {}
        for optimizer, groups in self._parts:
            for name, parameter in _pairs(groups):
                for field, value in optimizer.state.get(parameter, {}).items():
                    if not isinstance(value, Tensor):
                        raise TypeError(f"optimizer state {name}/{field} is no tensor")
                    tensors[f"{name}/{field}"] = value
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave.

        Raises CheckpointError where the names are not this model's parameters.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            by_name.setdefault(name, {})[field] = value
        for optimizer, groups in self._parts:
            names = [name for name, _ in _pairs(groups)]
            state = {i: by_name.pop(name) for i, name in enumerate(names) if name in by_name}
            live = optimizer.state_dict()
            optimizer.load_state_dict({"state": state, "param_groups": live["param_groups"]})
            for name, parameter in _pairs(groups):
                own = optimizer.state.get(parameter, {})
                for field, value in own.items():
                    # torch gives moments their parameter's type; those of bf16 weights are fp32
                    if value.dtype != tensors[f"{name}/{field}"].dtype:
                        own[field] = tensors[f"{name}/{field}"].to(value.device, copy=True)
        if by_name:
            unknown = ", ".join(sorted(by_name)[:3])
            raise CheckpointError(f"the optimizer state names unknown parameters: {unknown}")


def _pairs(groups: Iterable[Group]) -> Iterator[tuple[str, nn.Parameter]]:
    for group in groups:
        yield from zip(group.names, group.parameters, strict=True)


def build_optimizers(config: Optimizer, model: nn.Module) -> Optimizers:
    """The optimizers of `model`'s trainable parameters, grouped by `parameter_roles`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    roles = parameter_roles(model)
    if isinstance(config, AdamWConfig):
        return Optimizers([_adamw(config, parameters, roles)])
    if isinstance(config, AdafactorConfig):
        groups, live = _by_settings(config.lr, config.weight_decay, parameters, roles)
        eps = (None, config.least_scale)
        adafactor = Adafactor(live, lr=config.lr, beta2_decay=config.beta2_decay, eps=eps)
        return Optimizers([(adafactor, groups)])
    matrices = {name: p for name, p in parameters.items() if roles[name] == "matrix"}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    parts = [
        _muon(config, alike, make)
        for dims, make in ((2, _matrix_muon), (3, StackedMuon))
        if (alike := {name: p for name, p in matrices.items() if p.ndim == dims})
    ]
    return Optimizers([*parts, _adamw(config.adamw, rest, roles)])


def _muon(
    config: MuonConfig,
    matrices: Mapping[str, nn.Parameter],
    make: Callable[..., torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, list[Group]]:
    group = Group(tuple(matrices), tuple(matrices.values()), config.lr, config.weight_decay)
    optimizer = make(
        group.parameters,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
    )
    return optimizer, [group]


def _matrix_muon(params: Sequence[nn.Parameter], **settings: Any) -> Muon:
    return Muon(params, nesterov=True, adjust_lr_fn="original", **settings)


def _adamw(
    config: AdamWConfig, parameters: Mapping[str, nn.Parameter], roles: Mapping[str, Role]
) -> tuple[torch.optim.Optimizer, list[Group]]:
    groups, live = _by_settings(config.lr, config.weight_decay, parameters, roles)
    fused = all(p.device.type in FUSED_DEVICES for p in parameters.values())
    optimizer = torch.optim.AdamW(
        live, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )
    return optimizer, groups


def _by_settings(
    peak: float,
    decay: float,
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
) -> tuple[list[Group], list[dict[str, Any]]]:
    """At most three groups: decayed matrices, the rest, fast decay biases; and as torch wants."""
    settings: dict[tuple[float, float], list[str]] = {}
    for name in parameters:
        weight_decay = decay if roles[name] == "matrix" else 0.0
        lr = peak * (DECAY_LR_RATIO if roles[name] == "decay" else 1.0)
        settings.setdefault((lr, weight_decay), []).append(name)
    # the slow rate first: learning_rates() reports the first group
    groups = [
        Group(tuple(names), tuple(parameters[name] for name in names), lr, weight_decay)
        for (lr, weight_decay), names in sorted(settings.items())
    ]
    live: list[dict[str, Any]] = [
        {"params": list(group.parameters), "lr": group.lr, "weight_decay": group.weight_decay}
        for group in groups
    ]
    return groups, live
