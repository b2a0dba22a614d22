"""What was measured once about this machine, kept in `machine.json` in the cache."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

log = logging.getLogger("valkyrie")

Entry = dict[str, float]
"""Numbers by name, all of them positive."""


def measured(
    key: str,
    names: tuple[str, ...],
    measure: Callable[[], Entry],
    *,
    cache_dir: Path | None = None,
    refresh: bool = False,
) -> Entry:
    """What `measure` gives under `names`, or what it gave the last time under this key.

    A cache that can't be read or written costs a measurement, never an error.
    """
    path = cache_dir / "machine.json" if cache_dir is not None else None
    kept = _read(path).get(key, {})
    if kept.keys() == set(names) and not refresh:
        return kept
    found = measure()
    if path is not None:
        # another process may have added an entry while this one measured
        _write(path, {**_read(path), key: found})
    return found


def _read(path: Path | None) -> dict[str, Entry]:
    """The valid entries of the file; none if it is missing or damaged."""
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("measuring again: %s can't be read (%s)", path, error)
        return {}
    if not isinstance(content, Mapping):
        log.warning("measuring again: %s does not hold a JSON object", path)
        return {}
    return {key: dict(entry) for key, entry in content.items() if _is_valid(entry)}


def _is_valid(entry: object) -> bool:
    if not isinstance(entry, Mapping) or not entry:
        return False
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e20
        for value in entry.values()
    )


def _write(path: Path, entries: dict[str, Entry]) -> None:
    """Replaces the file in one move, so that no reader sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as handle:
            json.dump(entries, handle, indent=1, sort_keys=True)
        Path(handle.name).replace(path)
    except OSError as error:
        log.warning("what was measured is not kept: %s", error)
