"""What a training process holds beside its tensors: measured by training next to nothing.

    python -m valkyrie_core.runs.process_memory FILE

Python, torch and the other libraries take hundreds of megabytes, most of them late: at the first
update, the first validation, the first checkpoint. So a whole training of a model of a few thousand
weights runs, in a process of its own, and the peak of that process is written to FILE.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

from valkyrie_core.errors import ValkyrieError
from valkyrie_core.machine.apart import run_apart
from valkyrie_core.machine.memory import peak_memory

log = logging.getLogger("valkyrie")

RECIPE = """
name: next-to-nothing
data:
  corpora:
    python: {type: python, parts: [documentation], max_documents: 8}
  tokenizer: {type: bytes}
model:
  dim: 16
  core:
    type: stack
    blocks:
      attn: {mixer: {type: attention, num_heads: 1}, ffn: {type: swiglu}}
    pattern: [attn]
train:
  type: supervised
  steps: 2
  batch_size: 1
  context_len: 16
  eval_tokens: 256
  sample_prompts: ["The "]
"""


def measure_held_bytes() -> int:
    """The peak of a training of next to nothing; takes some ten seconds.

    Raises:
        OSError: the process failed, or the system does not tell a process's peak.
    """
    try:
        return int(run_apart(__name__))
    except OSError as error:
        raise OSError(f"the memory of a training process could not be measured: {error}") from error


def main(answer: Path) -> int:
    """Trains in this process and writes down what it held."""
    from valkyrie_core import runs
    from valkyrie_core.recipe import resolve_bytes

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"runs_dir={json.dumps(folder)}"]
        recipe = resolve_bytes(RECIPE.encode(), "next-to-nothing", overrides).recipe
        try:
            runs.train(recipe)
        except ValkyrieError as error:
            log.error("%s", error)
            return error.exit_code
    peak = peak_memory()
    if peak is None:
        log.error("this system does not tell how much memory a process held")
        return 1
    answer.write_text(str(peak), encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
