"""The formats that reports and options name; apart, since the program's help needs no pydantic."""

from __future__ import annotations

from typing import Literal

Weights = Literal["fp32", "bf16", "int8"]
"""The format of a model's matrices; fp32 is what was trained."""
KVFormat = Literal["computed", "int8"]
"""How keys and values are kept."""
RecurrentFormat = Literal["computed", "bf16", "int8"]
"""How recurrent states are kept."""
