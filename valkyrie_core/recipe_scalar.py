"""The YAML 1.2 core schema: what a scalar without quotes means."""

from __future__ import annotations

import re
from typing import Any

_MAX_DIGITS = 400

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)")

TOO_LONG = object()
"""Stands for a number with more digits than anyone means."""


def resolve_plain(text: str) -> Any:
    """What a scalar without quotes means in the YAML 1.2 core schema."""
    if _NULL.fullmatch(text):
        return None
    match = _BOOL.fullmatch(text)
    if match is not None:
        return match[1] is not None
    if _FLOAT.fullmatch(text) or _HEX.fullmatch(text) or _OCTAL.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            return TOO_LONG
        for pattern, base in ((_INT, 10), (_HEX, 16), (_OCTAL, 8)):
            if pattern.fullmatch(text):
                return int(text, base)
        return float(text)
    match = _INF.fullmatch(text)
    if match is not None:
        return float(f"{match[1]}inf")
    return float("nan") if _NAN.fullmatch(text) else text
