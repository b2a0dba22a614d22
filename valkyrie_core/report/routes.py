"""Which mixers the tokens of a text went through."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class PassRoutes(Part):
    """What one router did; a layer that is looped has one for every loop."""

    layer: int
    """Its place in the core."""
    loop: int | None
    """Counted from 1; None where the layer runs once."""
    block: str
    """The block's name."""
    mixers: list[str]
    """By name."""
    hard: bool
    """Whether mixers ran for the tokens alone that they were chosen for; else all ran for all."""
    share: dict[str, float]
    """Of the tokens that each mixer was used for; soft: its mean gate."""
    operations: float
    """Of those that the costliest mixer would take for all tokens."""
    likeliest: list[int]
    """By token: the mixer with the greatest gate."""
    used: list[list[int]]
    """By token: the mixers that ran for it."""

    @property
    def place(self) -> str:
        """For people: layer 2 (chosen), loop 1."""
        loop = f", loop {self.loop}" if self.loop is not None else ""
        return f"layer {self.layer} ({self.block}){loop}"


class RoutesReport(Report):
    """Which mixers the tokens of a text went through."""

    schema_: Literal["valkyrie.routes/1"] = Field(default="valkyrie.routes/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """Of the checkpoint."""
    text: str
    """Where the text is from."""
    tokens: list[str]
    """The text, token by token, what can't be printed escaped."""
    routers: list[PassRoutes]
    """In the order in which they run."""
    seconds: float
    """Wall-clock time."""
