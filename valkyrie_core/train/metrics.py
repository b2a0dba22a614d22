"""metrics.jsonl: one row of JSON per logged step, validation and sample, told apart by `kind`.

    train   loss (nats per token, mean since the last row), lr by optimizer, lr_scale, grad_norm,
            tokens_seen, and the timing fields; with experts the last step's aux (losses by name)
            and load (tokens by layer and expert), and what was revived since the last row
            ([layer, expert, copied expert])
    val     bpb (all corpora's bytes together), bpb_by_corpus
    sample  prompt, text

A resumed run drops the rows that lie after its checkpoint and writes them again, so that rows are
never doubled and, the timing fields apart, equal those of an undisturbed run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

TIMING_FIELDS = frozenset({"seconds", "tokens_per_second", "mfu"})
"""What depends on the machine's mood and not on the recipe."""

Row = dict[str, Any]


def read_metrics(path: Path) -> list[Row]:
    """All rows that are whole; a torn last line is passed over, as is a damaged one (announced)."""
    if not path.exists():
        return []
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            # the last piece is empty, or torn by a crash in the middle of a write
            if number < len(lines):
                log.warning("%s:%d: a damaged row is left out", path, number)
            continue
        # a torn number is still a number (0.25 -> 0.2): only a closed object counts
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
            rows.append(row)
        elif number < len(lines):
            log.warning("%s:%d: a damaged row is left out", path, number)
    return rows


class MetricsLog:
    """Appends rows; every row is with the system when `write` returns."""

    def __init__(self, path: Path, storage: Storage) -> None:
        self._path = path
        self._storage = storage
        self.rows: list[Row] = []

    def start(self, keep: Callable[[Row], bool]) -> None:
        """Read the file and drop the rows that `keep` refuses; the file is replaced in one step."""
        self.rows = [row for row in read_metrics(self._path) if keep(row)]
        data = b"".join(map(_line, self.rows))
        if not self._path.exists() or self._path.read_bytes() != data:
            self._storage.replace_bytes(self._path, data)

    def write(self, row: Row) -> None:
        """Append one row; NaN and Inf are refused, they are no JSON."""
        self._storage.append(self._path, _line(row))
        self.rows.append(row)

    def sync(self) -> None:
        """Force the rows to the disk: called before a checkpoint that they precede."""
        self._storage.sync(self._path)

    def last(self, kind: str) -> Row | None:
        """The newest row of a kind."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    def of_kind(self, kind: str) -> list[Row]:
        """All rows of a kind, oldest first."""
        return [row for row in self.rows if row["kind"] == kind]


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def samples_markdown(rows: list[Row]) -> str:
    """The sample rows as a document; control characters are shown, never sent to a terminal."""
    parts = ["# Samples\n"]
    step = None
    for row in rows:
        if row["step"] != step:
            step = row["step"]
            parts.append(f"\n## Step {step}\n")
        body = f"{row['prompt']}▸{row['text']}"
        parts.append("\n" + "".join(f"    {line}\n" for line in _visible(body).split("\n")))
    return "".join(parts)


def _visible(text: str) -> str:
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
