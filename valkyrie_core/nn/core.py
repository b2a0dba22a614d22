"""The menu of cores: how often, and in what order, blocks run.

A core has `layers`, each once, and `passes`, the layer of each pass in the order in which they run;
a state belongs to a pass.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator

from valkyrie_core.nn.block import Stack, StackConfig
from valkyrie_core.nn.canvas_core import CanvasConfig, CanvasCore
from valkyrie_core.nn.recursive import Recursive, RecursiveConfig

Core = Stack | Recursive | CanvasCore
CoreConfig = Annotated[StackConfig | RecursiveConfig | CanvasConfig, Discriminator("type")]
