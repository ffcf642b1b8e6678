"""Threads that each work on their own, and memory that each of them keeps."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from scalerec.hardware import single_threads

KEPT = 1 << 24  # entries of the largest buffer that is kept

_memory = threading.local()
_pools: dict[int, ThreadPoolExecutor] = {}
_making = threading.Lock()
os.register_at_fork(after_in_child=_pools.clear)  # a forked process has the pools and none of their threads


def scratch(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory of any content, one of each name for a thread, kept from call to call: fresh pages are slow."""
    size = math.prod(shape)
    buffers: dict[tuple[str, torch.dtype], Tensor] = _memory.__dict__.setdefault("buffers", {})
    kept = buffers.get((name, dtype))
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of that mode
            kept = torch.empty(size, dtype=dtype)
        if size <= KEPT:
            buffers[name, dtype] = kept
    return kept[:size].view(shape)


def worth(amount: int, alone: int) -> int:
    """How many of torch's threads such an amount of work occupies, `alone` being too little for a second one."""
    return max(1, min(torch.get_num_threads(), amount // alone))


def piece(size: int, number: int, count: int) -> tuple[int, int]:
    """Beginning and end of piece `number` of `count` nearly equal ones."""
    return size * number // count, size * (number + 1) // count


def in_threads(task: Callable[[int], None], count: int) -> None:
    """Call task(0) to task(count - 1) at once, each on a thread whose operations stay on it."""
    if count == 1:
        task(0)
        return
    for done in [_pool(count).submit(task, number) for number in range(count)]:
        done.result()


def _pool(count: int) -> ThreadPoolExecutor:
    with _making:
        if count not in _pools:
            _pools[count] = single_threads(count)
        return _pools[count]
