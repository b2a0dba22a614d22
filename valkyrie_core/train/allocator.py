"""What the C library does with memory that training frees: keeps it, or gives it back at once."""

from __future__ import annotations

import ctypes
import logging
import sys

log = logging.getLogger("valkyrie")

# from glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
TOP_PAD = 64 << 20
"""Bytes more than asked for that the heap grows by."""
LARGE = 1 << 20
"""Bytes from which on a block is mapped by itself where memory is short."""


def keep_memory() -> bool:
    """Ask the C library to hand no freed memory back to the system while the process lives.

    glibc maps every large block by itself and unmaps it when it is freed, so each activation of
    each step would be mapped, zeroed and faulted in, page after page: up to a fifth of the time of
    eager training on a CPU. The price is that the process stays as large as it was at its largest,
    and that free memory lies in pieces.

    Returns:
        Whether the C library took the advice; False where it is not glibc, which is harmless.
    """
    largest = 2**31 - 1
    taken = _advise((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, largest), (M_TOP_PAD, TOP_PAD))
    if taken:
        log.info("freed memory stays with the process, so that no step faults its pages in again")
    return taken


def return_memory() -> bool:
    """Ask the C library to give every large block back as soon as it is freed.

    By itself glibc learns to keep blocks of up to 32 MiB on the heap, where matrices of one size
    leave holes that those of another do not fill: half as much again as a model of bf16 matrices.

    Returns:
        As `keep_memory`.
    """
    return _advise((M_MMAP_THRESHOLD, LARGE))


def _advise(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    # musl has no mallopt; glibc alone says its version
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    return all(library.mallopt(*setting) == 1 for setting in settings)
