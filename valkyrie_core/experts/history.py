"""What the metrics of a training say about loads.

Shapes: S logged steps, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from valkyrie_core.experts.measures import DEAD_SHARE, Floats, Ints


class History(NamedTuple):
    """The logged loads of one layer, oldest first."""

    steps_S: Ints
    share_SE: Floats
    """Load over ideal, of the logged step alone."""


def load_history(
    rows: Iterable[dict[str, Any]], sizes: dict[int, int], last_step: int
) -> dict[int, History]:
    """The loads of every layer up to a step, from the rows of metrics.jsonl.

    Args:
        sizes: experts of every layer. A row that does not fit is passed over.
    """
    found: dict[int, tuple[list[int], list[Floats]]] = {index: ([], []) for index in sizes}
    for row in rows:
        load = row.get("load")
        if row.get("kind") != "train" or row["step"] > last_step or not isinstance(load, dict):
            continue
        for index, (steps, shares) in found.items():
            counts = load.get(str(index))
            if isinstance(counts, list) and len(counts) == sizes[index] and sum(counts):
                counts_E = np.array(counts, dtype=np.float64)
                steps.append(row["step"])
                shares.append(counts_E / counts_E.mean())
    return {
        index: History(np.array(steps, dtype=np.int64), np.stack(shares))
        for index, (steps, shares) in found.items()
        if steps
    }


def dead_steps(history: History | None, expert: int) -> int | None:
    """Steps that an expert has been dead for: from the last logged step in which it was not.

    0: it was alive in the last one; from the beginning if it never was. None: nothing is logged.
    """
    if history is None:
        return None
    alive_S = history.steps_S[history.share_SE[:, expert] >= DEAD_SHARE]
    return int(history.steps_S[-1] - (alive_S[-1] if len(alive_S) else 0))
