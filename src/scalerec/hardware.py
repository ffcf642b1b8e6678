"""What this process may use of its machine."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Ask the C library not to hand freed memory back to the system; whether it does as asked (glibc alone can).

    Tensors of some megabytes are otherwise mapped and unmapped again and again: every first touch of a fresh page
    costs a microsecond, which is up to half of a large step (docs/performance.md). The peak hardly moves, since what
    is kept is used again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))
