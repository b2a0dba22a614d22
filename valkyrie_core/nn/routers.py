"""What is done to all routers among the mixers of a model at once."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from valkyrie_core.nn.routed import RoutedMixer

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def undecided(model: AnyModule) -> AnyModule:
    """The model with all mixers running for all tokens: what is planned for, as no value is known
    before there are numbers."""
    for module in model.modules():
        if isinstance(module, RoutedMixer):
            module.hard = False
    return model


def foreseen(model: AnyModule) -> AnyModule:
    """The model with routers that cost what they will on average over training: what designs are
    matched by before there are numbers."""
    for module in model.modules():
        if isinstance(module, RoutedMixer):
            module.used = module.foreseen()
    return model


def settle_routers(model: nn.Module) -> None:
    """After weights were read: routers are as hard as those were."""
    for module in model.modules():
        if isinstance(module, RoutedMixer):
            module.settle()
