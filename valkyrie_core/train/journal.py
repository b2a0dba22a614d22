"""What a run tells about itself: rows of metrics, a tracker, samples.md and curves.png."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from valkyrie_core.train.curves import draw_curves
from valkyrie_core.train.metrics import MetricsLog, Row, samples_markdown
from valkyrie_core.train.progress import Meter, Position, Validation
from valkyrie_core.train.routing import Routing
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.track import Tracker, numbers

DRAW_SECONDS = 30.0
"""curves.png is drawn at validations, but not more often than this."""


class Journal:
    """Writes the rows of one run; all but metrics.jsonl is derived from them."""

    def __init__(self, run: RunDir, tracker: Tracker | None) -> None:
        self._run = run
        self._tracker = tracker
        self._metrics = MetricsLog(run.metrics_file, run.storage)
        self._drawn = -math.inf

    def start(self, step: int, validated: int) -> None:
        """Keep the rows up to a checkpoint and drop those that will be written again."""

        def keep(row: Row) -> bool:
            return bool(row["step"] <= (step if row["kind"] == "train" else validated))

        self._metrics.start(keep if step else lambda _row: False)

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint must not outlive the rows before it."""
        self._metrics.sync()

    def train(
        self,
        at: Position,
        meter: Meter,
        learning_rates: Mapping[str, float],
        routing: Routing,
        more: Row,
    ) -> None:
        """The row of a training step; the loss is the mean since the last such row."""
        experts: Row = {}
        if routing.mixers.row:
            experts["routes"] = routing.mixers.row
        if routing.loads:
            experts |= {
                "aux": dict(routing.losses),
                "load": {str(layer): load for layer, load in routing.loads.items()},
                "revived": at.take_revived(),
            }
        self._write(
            {
                "kind": "train",
                "step": at.step,
                "loss": at.take_mean_loss(),
                "lr": dict(learning_rates),
                "lr_scale": at.lr_scale,
                "grad_norm": at.grad_norm,
                "tokens_seen": at.tokens_seen,
                "seconds": round(at.seconds, 3),
                "tokens_per_second": meter.tokens_per_second,
                "mfu": meter.mfu,
                **experts,
                **more,
            }
        )

    def validation(
        self, step: int, validation: Validation | None, samples: Sequence[tuple[str, str]]
    ) -> None:
        """The rows of a validation, and samples.md."""
        if validation is not None:
            by_corpus = dict(validation.by_corpus)
            self._write(
                {"kind": "val", "step": step, "bpb": validation.bpb, "bpb_by_corpus": by_corpus}
            )
        for prompt, text in samples:
            self._metrics.write({"kind": "sample", "step": step, "prompt": prompt, "text": text})
        if samples:
            document = samples_markdown(self._metrics.of_kind("sample"))
            self._run.storage.replace_bytes(self._run.samples_file, document.encode())
        if time.monotonic() - self._drawn > DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draw curves.png anew."""
        if self._metrics.rows:
            picture = draw_curves(self._metrics.rows, title=self._run.name)
            self._run.storage.replace_bytes(self._run.curves_file, picture)
        self._drawn = time.monotonic()

    def last(self, kind: str) -> Row | None:
        """The newest row of a kind."""
        return self._metrics.last(kind)

    def _write(self, row: Row) -> None:
        self._metrics.write(row)
        if self._tracker is not None:
            self._tracker.log(row["step"], numbers(row))
