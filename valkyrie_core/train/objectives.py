"""The menu of objectives: what a model learns by."""

from __future__ import annotations

from collections.abc import Callable

from valkyrie_core.data.batch import Batch
from valkyrie_core.data.questions import Question
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.models import Model
from valkyrie_core.train.config import SupervisedConfig
from valkyrie_core.train.deep_supervision import DeepSupervision
from valkyrie_core.train.next_token import NextToken
from valkyrie_core.train.objective import Objective, Running
from valkyrie_core.train.routing import Routing


def build_objective(
    config: SupervisedConfig,
    model: Model,
    batch: Callable[[int], Batch],
    question: Callable[[int], Question],
    routing: Routing,
    running: Running,
) -> Objective:
    """The objective of a model.

    Args:
        batch: the packed text of a step, for a language model.
        question: a question by its number, for a canvas.
    """
    if isinstance(model, Canvas):
        return DeepSupervision(config, model, question, routing, running)
    return NextToken(config, model, batch, routing, running)
