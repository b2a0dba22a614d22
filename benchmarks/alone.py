"""Calls a function of the benchmarks in a process of its own, for what a process has but once:
its allocator's settings, its peak memory, and what a library reads from its environment.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.result import ROOT


def call(
    module: str,
    function: str,
    *arguments: str | int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[float]:
    """The numbers that `module.function(*arguments)` gives in a fresh process.

    Args:
        module: where the function is, by its dotted name.
        function: what is called.
        arguments: what it is called with.
        environment: variables that the process has beside ours.

    Raises:
        OSError: the process failed; the message is its last line.
    """
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.alone", json.dumps([module, function, *arguments])],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no word"])[-1]
        raise OSError(f"{module}.{function} failed in its own process: {last}")
    return [float(value) for value in json.loads(run.stdout.splitlines()[-1])]


if __name__ == "__main__":
    name, attribute, *rest = json.loads(sys.argv[1])
    print(json.dumps(getattr(importlib.import_module(name), attribute)(*rest)))
