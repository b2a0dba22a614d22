"""Where things are kept that can be made again: packed data, kernels, measured peaks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$VALKYRIE_CACHE, else $XDG_CACHE_HOME/valkyrie, else ~/.cache/valkyrie."""
    if own := os.environ.get("VALKYRIE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "valkyrie"
