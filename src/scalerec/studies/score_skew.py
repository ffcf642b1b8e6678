"""Scores that were served against those of the checkpoint: how far apart, and in the same order?

n rows   T tasks   G groups
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class ScoreSkew:
    """Pairs of scores, added piece by piece; two float32 a row and task stay in memory."""

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tasks
        self._requests: list[np.ndarray] = []
        self._served: list[np.ndarray] = []
        self._ours: list[np.ndarray] = []

        self.broken = np.zeros(len(tasks), np.int64)  # served scores that are no numbers

    def add(self, requests: np.ndarray, served: np.ndarray, ours: np.ndarray, broken: Sequence[int]) -> None:
        """`requests` [n] uint64 codes; scores [n, T], NaN where a task was not served or `broken` [T] of them were."""
        self.broken += broken
        self._requests.append(requests)
        self._served.append(served.astype(np.float32))
        self._ours.append(ours.astype(np.float32))

    def found(self) -> list[dict[str, Any]]:
        """Per task: rows, differences and rank correlations; over all rows, and the mean of the requests' own."""
        if not self._requests:
            return []
        requests, served, ours = map(np.concatenate, (self._requests, self._served, self._ours))
        entries = []
        for j, task in enumerate(self.tasks):
            there = ~np.isnan(served[:, j])
            if not there.any():
                if self.broken[j]:
                    entries.append({"task": task, "rows": 0, "not_a_number": int(self.broken[j])})
                continue
            a, b = served[there, j], ours[there, j]
            gap = np.abs(a.astype(np.float64) - b)
            within = rank_correlations(requests[there], a, b)
            known = within[~np.isnan(within)]
            entries.append({
                "task": task, "rows": int(there.sum()), "not_a_number": int(self.broken[j]),
                "largest_difference": float(gap.max()),
                "mean_difference": float(gap.mean()), "mean_served": float(a.mean()), "mean_rescored": float(b.mean()),
                "rank_correlation": _number(rank_correlations(np.zeros(len(a), np.int64), a, b)[0]),
                "rank_correlation_in_request": float(known.mean()) if len(known) else None,
                "requests": len(known),
            })  # fmt: skip
        return entries


def rank_correlations(groups: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation [G] of a and b [n] in each group, ties at their mean rank; NaN where one is constant."""
    owner = np.unique(groups, return_inverse=True)[1]
    count = np.bincount(owner)
    x, y = (_ranks(owner, values) for values in (a, b))
    x, y = (ranks - (np.bincount(owner, ranks) / count)[owner] for ranks in (x, y))
    squares = np.bincount(owner, x * x) * np.bincount(owner, y * y)
    return np.divide(np.bincount(owner, x * y), np.sqrt(squares), out=np.full(len(count), np.nan), where=squares > 0)


def _ranks(owner: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean place [n] of each value among its tied ones, in the order of owner and value."""
    order = np.lexsort((values, owner))
    new = np.append(True, (np.diff(owner[order]) != 0) | (np.diff(values[order]) != 0))
    run = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(order)) - 1
    ranks = np.empty(len(order))
    ranks[order] = ((first + last) / 2)[run]
    return ranks


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
