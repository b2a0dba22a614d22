"""What all reports share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Report(BaseModel):
    """The result of one command; `schema` names the command and the version of its shape."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        serialize_by_alias=True,
        ser_json_inf_nan="null",
    )


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="null"
    )


Weights = Literal["fp32", "bf16", "int8"]
"""The format of a model's matrices; fp32 is what was trained."""


KVFormat = Literal["computed", "int8"]
"""How keys and values are kept."""
RecurrentFormat = Literal["computed", "bf16", "int8"]
"""How recurrent states are kept."""
