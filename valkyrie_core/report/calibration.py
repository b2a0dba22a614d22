"""What calibrating answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class TriedThreshold(Part):
    """One threshold on the calibration rows."""

    threshold: float
    risk: float
    """How often, of all rows, ending early made a right answer wrong; of text, the mean share of a
    document's tokens that would be others. Of several corpora, that of the worst."""
    p: float
    """Of so little, were the true risk as high as allowed."""
    reasoning_steps: float
    """Mean depth."""
    holds: bool
    """Whether p is at most delta."""


class CalibrationTest(Part):
    """What the threshold does on rows that did not choose it."""

    rows: int
    risk: float
    """As above."""
    score: float | None
    """The share of right answers; None where text is read."""
    full_score: float | None
    """Likewise, at full depth."""
    reasoning_steps: float
    """Mean depth."""
    seconds: float
    """Of all rows, the fastest of some passes."""
    full_seconds: float
    """Likewise, at full depth, in turns with the others."""


class CalibrateReport(Report):
    """A threshold of confidence with a guarantee."""

    schema_: Literal["valkyrie.calibrate/1"] = Field(default="valkyrie.calibrate/1", alias="schema")
    run: str
    step: int
    """Of the checkpoint that the promise is about."""
    risk: float
    """The highest that is allowed."""
    delta: float
    """The chance that is taken of more than that."""
    unit: Literal["question", "document"]
    """What a row is."""
    rows: int
    """Calibration rows, of the corpus that has fewest."""
    rows_needed: int
    """The fewest that could hold a threshold, if there is not one error."""
    full_depth: int
    then: Literal["halt", "cheapest"] = "halt"
    """What becomes of a token that is sure: no later loop is about it, or it goes on through the
    routers' cheapest mixers, and its depth is the loop after which it was sure."""
    threshold: float | None
    """Confidence from which thought ends; None: no threshold holds, and full depth is kept."""
    tried: list[TriedThreshold]
    """The most careful first; the walk ends at the first that does not hold."""
    test: CalibrationTest
    """On the other half of the held-out rows."""
    seconds: float
    """How long all of this took."""
