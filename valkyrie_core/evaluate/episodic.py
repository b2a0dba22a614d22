"""An episodic memory of verified answers, for a canvas that is asked many questions.

The key of a question is what stands in its cells after the first step of thought. Where a stored
key is near, its answer is tried: the task's exact checker says whether it holds for this question,
and only then is thought ended. What is stored was verified, too. So a memory can save steps, and
never makes an answer wrong. It is empty before every split, and what it holds comes from earlier
questions of that split alone.

Shapes: B questions side by side, C cells, M the memory tokens and the cells, D model; K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from valkyrie_core.data.readers.questions import TaskConfig
from valkyrie_core.data.tasks.task import Example, correct
from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.infer.answer import END, laid_out, read_answer
from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.answering import Done, TokenRule, answers, rows_of
from valkyrie_core.nn.canvas import Canvas

BATCH_SIZE = 32


class Episodes:
    """Answers by key."""

    def __init__(self, threshold: float) -> None:
        """`threshold` is the least cosine of two keys that are near."""
        self.threshold = threshold
        self._keys_KD: Tensor | None = None
        self._answers: list[str] = []

    def __len__(self) -> int:
        return len(self._answers)

    def recall(self, key_D: Tensor) -> str | None:
        """The answer of the nearest key, if that is near enough."""
        if self._keys_KD is None:
            return None
        cosine, place = (self._keys_KD @ F.normalize(key_D, dim=0)).max(dim=0)
        return self._answers[int(place)] if float(cosine) >= self.threshold else None

    def keep(self, key_D: Tensor, answer: str) -> None:
        """Stores an answer; who calls has verified it."""
        key_1D = F.normalize(key_D, dim=0)[None]
        self._keys_KD = key_1D if self._keys_KD is None else torch.cat([self._keys_KD, key_1D])
        self._answers.append(answer)


class Remembered(NamedTuple):
    """What became of questions that were asked one batch after the other."""

    right: list[bool]
    hits: int
    """Recalled answers that held."""
    refused: int
    """Recalled answers that did not hold for this question: it was thought about as ever."""
    misses: int
    """Questions without a near one."""
    steps: int
    """Of all questions together; a hit takes one."""
    stored: int


def asked_with_memory(
    model: Canvas,
    tokenizer: Tokenizer,
    task: TaskConfig,
    questions: Sequence[Example],
    *,
    threshold: float,
    rule: TokenRule | Done | None = None,
    min_steps: int = 1,
    precision: Precision = "fp32",
    keys_of: Callable[[Tensor], Tensor] = lambda keys_BX: keys_BX,
) -> Remembered:
    """Asks questions, and remembers what was verified.

    Args:
        threshold: see `Episodes`.
        rule: what ends thought besides; see `nn.answering.answers`.
        min_steps: no thought ends before; a recalled answer does not wait for it.
        keys_of: changes the keys of a batch before they are looked up or stored (a test shuffles
            them).
    """
    episodes = Episodes(threshold)
    right, hits, refused, steps = list[bool](), 0, 0, 0
    model.eval()
    device = model.memory_MD.device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
    for start in range(0, len(questions), BATCH_SIZE):
        batch = questions[start : start + BATCH_SIZE]
        with torch.inference_mode(), autocast:
            tokens_BC = laid_out(model, tokenizer, [one.prompt for one in batch])
            first = next(iter(model.steps(tokens_BC, 1)))
            cells_BCD = first.carry.z_H_BMD[:, len(model.memory_MD) :]
            keys_BX = keys_of(cells_BCD.flatten(1))
            recalled = [episodes.recall(key_X) for key_X in keys_BX]
            held = [
                said is not None and task.holds(one.prompt, said)
                for one, said in zip(batch, recalled, strict=True)
            ]
            open_ = [index for index, hit in enumerate(held) if not hit]
            said = [text if text is not None else "" for text in recalled]
            if open_:
                rows_A = torch.tensor(open_, device=tokens_BC.device)
                found = answers(
                    model,
                    tokens_BC[rows_A],
                    rule,
                    watched_BC=_answered_cells(model, tokenizer, batch)[rows_A],
                    min_steps=min_steps,
                    first=rows_of(first, rows_A),
                )
                steps += int(found.steps_B.sum())
                for index, logits_CV in zip(open_, found.logits_BCV, strict=True):
                    said[index] = read_answer(tokenizer, logits_CV)
        hits += sum(held)
        steps += sum(held)
        refused += sum(text is not None for text in recalled) - sum(held)
        for index, (one, text) in enumerate(zip(batch, said, strict=True)):
            right.append(correct(one, text))
            if not held[index] and task.holds(one.prompt, text):
                episodes.keep(keys_BX[index], text)
    misses = len(right) - hits - refused
    return Remembered(right, hits, refused, misses, steps, len(episodes))


def _answered_cells(model: Canvas, tokenizer: Tokenizer, asked: Sequence[Example]) -> Tensor:
    """[B, C] the cells where the answers and their ends stand: a rule for tokens watches them, as
    it does without a memory."""
    sizes = [len(tokenizer.encode(one.answer + END)) for one in asked]
    sizes_B1 = torch.tensor(sizes, device=model.memory_MD.device)[:, None]
    return torch.arange(model.cells, device=sizes_B1.device) < sizes_B1
