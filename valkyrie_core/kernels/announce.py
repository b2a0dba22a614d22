"""Says once, and loudly, where native code can't be had and a slower form serves."""

from __future__ import annotations

import logging

from valkyrie_core.kernels import build

log = logging.getLogger("valkyrie")
_announced: set[tuple[str, str]] = set()


def native_serves(source: str, what: str) -> bool:
    """Whether the library `csrc/<source>.cpp` can be had here; a warning says why not, once.

    Args:
        source: the name of the source.
        what: what then runs as PyTorch operations, as the beginning of a sentence.
    """
    try:
        build.library(source)
    except build.BuildError as error:
        if (source, str(error)) not in _announced:
            _announced.add((source, str(error)))
            log.warning("%s as PyTorch operations, slower than native code: %s", what, error)
        return False
    return True


# what torch.compiler.assume_constant_result does, after a second of importing the compiler
native_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]
