"""Calls a function of the benchmarks in a process of its own, for what a process has but once:
its allocator's settings and its peak memory.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

from benchmarks.result import ROOT


def call(module: str, function: str, *arguments: str | int) -> float:
    """What `module.function(*arguments)` gives in a fresh process.

    Raises:
        OSError: the process failed; the message is its last line.
    """
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.alone", json.dumps([module, function, *arguments])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no word"])[-1]
        raise OSError(f"{module}.{function} failed in its own process: {last}")
    return float(json.loads(run.stdout.splitlines()[-1]))


if __name__ == "__main__":
    name, attribute, *rest = json.loads(sys.argv[1])
    print(json.dumps(getattr(importlib.import_module(name), attribute)(*rest)))
