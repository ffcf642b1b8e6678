"""How many threads a forward pass is worth on this machine: measured, since cores, caches and neighbours decide it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from scalerec.hardware import cores

# Milliseconds that a request waits for the event loop and the other way round where the model's threads, which spin at
# their barriers, take every core (docs/log.md, 2026-11-22).
WITHOUT_A_FREE_CORE = 3.0


def measure_threads(work: Callable[[], object], *, seconds: float = 2.0, most: int | None = None) -> dict[int, float]:
    """Median milliseconds of `work` by number of torch threads: 1, 2, 4 ... up to all cores, in turn.

    Leaves torch at the number that it had. Each is tried at least three times, however long that takes.
    """
    before = torch.get_num_threads()
    most = most or cores()
    counts = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
    found: dict[int, list[float]] = {count: [] for count in counts}
    try:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(found[counts[-1]]) < 3:
            for count in counts:  # in turn, so that a neighbour's burst falls on all alike
                torch.set_num_threads(count)
                started = time.perf_counter()
                work()
                found[count].append(1e3 * (time.perf_counter() - started))
    finally:
        torch.set_num_threads(before)
    return {count: statistics.median(times[1:]) for count, times in found.items()}


def best_threads(milliseconds: dict[int, float], of: int) -> int:
    """The fewest threads within a tenth of the fastest: the cores that they leave serve other requests.

    All cores, `of` so many, have to be worth it by WITHOUT_A_FREE_CORE more.
    """
    in_service = {count: time + WITHOUT_A_FREE_CORE * (count >= of > 1) for count, time in milliseconds.items()}
    fastest = min(in_service.values())
    return min(count for count, time in in_service.items() if time <= 1.1 * fastest)
