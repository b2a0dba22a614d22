"""The base of every configuration class: frozen, unknown keys forbidden, docstrings are help."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """One section of a recipe.

    A config class stands beside the thing it builds. The text under a field is its help: it is
    shown by `valkyrie recipe show` and exported in the JSON Schema for editors. Presence is the
    switch: an optional section that the recipe does not name is never built.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


class MisfitError(ValueError):
    """Raised by a validator over several keys; `at` says which key to change.

    `at` is the path from the section that the validator belongs to: ("pattern", 2).
    """

    def __init__(self, message: str, at: tuple[str | int, ...]) -> None:
        super().__init__(message)
        self.at = at
