"""What a canvas answers to a question."""

from __future__ import annotations

import torch

from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.canvas import EMPTY, Canvas

END = "\n"
"""What ends an answer in the corpora of questions."""


@torch.inference_mode()
def answered_by(model: Canvas, tokenizer: Tokenizer, question: str) -> str:
    """The answer after all steps, up to its end. UsageError where the question has no room."""
    ids = tokenizer.encode(question)
    if len(ids) > model.cells:
        raise UsageError(
            f"the question has {len(ids)} tokens, and the canvas {model.cells} cells",
            hint="ask a shorter one",
        )
    device = model.memory_MD.device
    tokens_BC = torch.tensor([ids + [EMPTY] * (model.cells - len(ids))], device=device)
    *_, out = model.steps(tokens_BC)
    text = tokenizer.decode(out.logits_BCV[0].argmax(-1).tolist())
    return text.partition(END)[0]
