"""What this process may use of its machine."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LARGE = 32 << 20  # bytes from which on memory is worth huge pages
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of malloc.h

_starting = threading.Lock()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def single_threads(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, on each of which torch's operations stay."""
    ready = threading.Barrier(count + 1)

    def begin() -> None:
        # Asked for its number a thread takes over the one last set by any, once: it must not do so later.
        torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of those yet to come
        ready.wait()

    with _starting:
        pool, threads = ThreadPoolExecutor(count, "scalerec", begin), torch.get_num_threads()
        try:
            for _ in range(count):
                pool.submit(int)
            ready.wait()
        except BaseException:  # no more threads can be started: those that were are not left waiting
            ready.abort()
            pool.shutdown(wait=False)
            raise
        finally:
            torch.set_num_threads(threads)
    return pool


def keep_freed_memory() -> bool:
    """Ask the C library not to hand freed memory back to the system; whether it does as asked (glibc alone can).

    Tensors of some megabytes are otherwise mapped and unmapped again and again: every first touch of a fresh page
    costs a microsecond, which is up to half of a large step (docs/performance.md). One arena for all threads, since
    those of threads are unmapped whatever is asked, and what one thread frees another can use: the peak falls.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1) and mallopt(ARENA_MAX, 1))


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A tensor of the same shape with any content, on a CPU with Linux in pages of 2 MiB where it is large.

    Rows at random, as ids are, otherwise cost a walk through the page table each: a third of their time.
    """
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    if not plain or tensor.nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return tensor
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
