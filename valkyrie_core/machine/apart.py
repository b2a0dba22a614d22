"""Measuring in a process of its own.

What a measurement draws from generators, or takes of memory, would stay with a training.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import valkyrie_core


def run_apart(module: str, *arguments: str) -> str:
    """What `python -m module arguments` prints, with this very package on its path.

    Raises OSError, with its last word, where it fails.
    """
    root = str(Path(valkyrie_core.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise OSError((run.stderr.strip().splitlines() or ["no word"])[-1])
    return run.stdout
