"""What a canvas answers to a question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import UsageError
from valkyrie_core.nn.canvas import EMPTY, Canvas

END = "\n"
"""What ends an answer in the corpora of questions."""


@torch.inference_mode()
def answered_by(model: Canvas, tokenizer: Tokenizer, question: str) -> str:
    """The answer after all steps, up to its end. UsageError where the question has no room."""
    *_, out = model.steps(laid_out(model, tokenizer, [question]))
    return read_answer(tokenizer, out.logits_BCV[0])


def laid_out(model: Canvas, tokenizer: Tokenizer, questions: Sequence[str]) -> Tensor:
    """Questions [B, C] in cells. UsageError where one has no room."""
    rows = []
    for question in questions:
        ids = tokenizer.encode(question)
        if len(ids) > model.cells:
            raise UsageError(
                f"the question has {len(ids)} tokens, and the canvas {model.cells} cells",
                hint="ask a shorter one",
            )
        rows.append(ids + [EMPTY] * (model.cells - len(ids)))
    return torch.tensor(rows, device=model.memory_MD.device)


def read_answer(tokenizer: Tokenizer, logits_CV: Tensor) -> str:
    """The likeliest answer, up to its end."""
    return tokenizer.decode(logits_CV.argmax(-1).tolist()).partition(END)[0]
