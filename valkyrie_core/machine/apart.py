"""Measuring in a process of its own.

What a measurement draws from generators, or takes of memory, would stay with a training.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import valkyrie_core


def run_apart(module: str, *arguments: str) -> str:
    """What `python -m module arguments FILE` writes into FILE, this very package on its path.

    Raises OSError, with the process's last word, where it fails.
    """
    root = str(Path(valkyrie_core.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        run = subprocess.run(
            [sys.executable, "-m", module, *arguments, str(answer)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise OSError((run.stderr.strip().splitlines() or ["no word"])[-1])
        return answer.read_text(encoding="ascii")
