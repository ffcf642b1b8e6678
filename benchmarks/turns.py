"""How benchmarks measure: calls in turn, ratios within a round, their median and spread, on all threads and on one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

Calls = Mapping[str, Callable[[], Any]]


def in_turn(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round, after one that does not count: the first of anything is slower."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(name: str, ratios: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {name: median(ratios), f"{name}_low": min(ratios), f"{name}_high": max(ratios)}


def paired(name: str, theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Seconds of the others over ours, round by round, and the milliseconds of both."""
    found = spread(name, [a / b for a, b in zip(theirs, ours)])
    return found | {f"{name}_ms_theirs": 1e3 * median(theirs), f"{name}_ms_ours": 1e3 * median(ours)}


def endings() -> dict[str, int]:
    """What the keys of figures end in -> threads: as many as torch has now, and one where that is fewer."""
    import torch  # takes seconds, and benchmarks that are refused need none of it

    count = torch.get_num_threads()
    if count == 1:
        print("one thread: there are no figures of several", file=sys.stderr)
        return {"": 1}
    return {"": count, "_one_thread": 1}


def by_threads(measure: Callable[[], Mapping[str, Any]], threads: Mapping[str, int]) -> dict[str, Any]:
    """The figures of `measure` on each number of `threads`, by name and ending; leaves torch at the last."""
    import torch

    found: dict[str, Any] = {}
    for ending, count in threads.items():
        torch.set_num_threads(count)
        found |= {name + ending: value for name, value in measure().items()}
    return found
