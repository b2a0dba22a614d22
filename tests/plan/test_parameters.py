"""Counts of parameters are those of a real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.nn.menu import CONFIGS
from tests.plan.recipes import ALL, name
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.models import build_model
from valkyrie_core.nn.recursive import RecursiveConfig
from valkyrie_core.plan.parameters import count_parameters, weightless
from valkyrie_core.recipe import Recipe


def real_count(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in set(build_model(config).parameters()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_total_and_parts_are_those_of_a_real_model(config: ModelConfig) -> None:
    counted = count_parameters(weightless(config))
    assert counted.total == real_count(config)
    idle = any(
        block.ffn.type == "moe" and block.ffn.gate.slots < block.ffn.num_experts
        for block in config.core.blocks.values()
    )
    assert (counted.active < counted.total) == idle
    assert sum(counted.by_part.values()) == counted.total
    kinds = {x for block in config.core.blocks.values() for x in (block.mixer.type, block.ffn.type)}
    if isinstance(config.core, RecursiveConfig):
        kinds.add("loops")
    if getattr(config.core, "feedback", None):
        kinds.add("feedback")
    assert set(counted.by_part) == {"embedding", "head", "norms", *kinds}
    assert (counted.by_part["head"] == 0) == (config.head == "tied")


@pytest.mark.parametrize("path", ALL, ids=name)
def test_every_recipe(path: Path) -> None:
    model = weightless(Recipe.load(path).model)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    counted = count_parameters(model)
    assert sum(counted.by_part.values()) == counted.total
    # a real one where it fits into a test
    if counted.total < 20_000_000:
        torch.manual_seed(0)
        assert counted.total == real_count(model.config)
