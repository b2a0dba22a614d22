"""One thread, so that bits are equal; a memory disk where there is one, so that fsync is cheap."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

MEMORY_DISK = Path("/dev/shm")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty directory for runs."""
    if not MEMORY_DISK.is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir=MEMORY_DISK, prefix="valkyrie-test-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data, shared by all tests."""
    return tmp_path_factory.mktemp("cache")
