"""What every test needs: a cache of its own, and one thread per worker."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path

import pytest

# torch's compiler imports setuptools late, which refuses once a test has made something load the
# standard library's distutils
with contextlib.suppress(ImportError):
    importlib.import_module("setuptools")

# before torch starts its threads: two-thread operations stall beside a busy process
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Points the cache into the repository: the user's own is neither read nor written.

    It is kept between runs, since building kernels and packing texts is what it is for.
    """
    cache = Path(str(config.rootpath)) / ".pytest_cache" / "valkyrie"
    os.environ["VALKYRIE_CACHE"] = str(cache)
