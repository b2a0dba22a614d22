"""The menu of models: what a recipe's `model` section builds."""

from __future__ import annotations

import torch

from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.canvas_core import CanvasConfig
from valkyrie_core.nn.model import HybridLM

Model = HybridLM | Canvas


def model_class(config: ModelConfig) -> type[HybridLM] | type[Canvas]:
    """The class of the model that a section describes."""
    return Canvas if isinstance(config.core, CanvasConfig) else HybridLM


def build_model(config: ModelConfig, matrices: torch.dtype = torch.float32) -> Model:
    """The model that a section describes, its matrices stored in that type."""
    return model_class(config)(config, matrices)
