"""The recipes of the repository, for tests over all of them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2] / "recipes"
TINY = sorted((ROOT / "tiny").glob("*.yaml"))
ALL = sorted(ROOT.rglob("*.yaml"))


def name(path: Path) -> str:
    return path.stem
