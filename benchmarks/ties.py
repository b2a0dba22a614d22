"""One design against itself, many times: how often is chance called a difference?

    python -m benchmarks.ties               # compares what is still missing, then writes the line
    python -m benchmarks.ties --tables      # only writes docs/compare.md anew

Every comparison has seeds of its own, three for each side. What is finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks import result, tables
from valkyrie_core import Recipe, runs
from valkyrie_core.errors import ValkyrieError
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

RECIPE = "tiny/rwkv7"
PAIRS = 20
SEEDS = 3
PAGE = result.ROOT / "docs" / "compare.md"
FILE = result.RESULTS / "ties.json"
NAME = "ties"


def main(arguments: list[str] | None = None) -> int:
    """Compares what is missing, then writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ties", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tables", action="store_true", help="compare nothing, write the page")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="comparisons")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("results", "ties"))
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        if not options.tables:
            found = [_compared(n, options.runs_dir, options.out) for n in range(options.pairs)]
            content = {"pairs": found, "origin": result.origin()._asdict()}
            Storage().replace_json(FILE, content)
        text = PAGE.read_text(encoding="utf-8")
        content = json.loads(FILE.read_text(encoding="utf-8"))
        PAGE.write_text(tables.put(text, NAME, summary(content)), encoding="utf-8")
    except KeyboardInterrupt:
        log.warning("stopped; go on with: python -m benchmarks.ties")
        return 130
    except ValkyrieError as error:
        log.error("%s; go on with: python -m benchmarks.ties", error)
        return error.exit_code
    return 0


def _compared(number: int, runs_dir: Path, out: Path) -> dict[str, Any]:
    """One comparison of the design with itself."""
    folder = out / f"{number:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    sides = []
    for side in ("one", "other"):
        path = folder / f"{side}.json"
        seed = 1000 + 2 * SEEDS * number
        Recipe.load(RECIPE, [f"name={side}", f"seed={seed}"]).save(path)
        sides.append(str(path))
    report = runs.compare(sides, seeds=SEEDS, runs_dir=runs_dir, out=folder)
    first = report.metrics[0]
    return {
        "value": first.difference.value,
        "low": first.difference.low,
        "high": first.difference.high,
        "outcome": first.outcome,
    }


def summary(content: dict[str, Any]) -> str:
    """How many were called a difference, and what could have been expected."""
    pairs = content["pairs"]
    wrong = sum(one["outcome"] != "not enough evidence" for one in pairs)
    # with so many comparisons, a chance of 5 % each
    n = len(pairs)
    few = sum(math.comb(n, k) * 0.05**k * 0.95 ** (n - k) for k in range(3))
    widths = sorted(one["high"] - one["low"] for one in pairs)
    origin = content["origin"]
    return (
        f"`python -m benchmarks.ties`: `{RECIPE}` against itself with other seeds, {n} comparisons "
        f"of {SEEDS} seeds a side. {wrong} of them were called a difference (at a chance of one in "
        f"twenty each, two or fewer are expected in {few:.0%} of such series). Their intervals are "
        f"{widths[n // 2]:.3f} bits per byte wide at the median. {origin['processor']}, "
        f"{origin['date']}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
