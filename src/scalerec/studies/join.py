"""Rows of two logs that belong together: equal user and item, the nearest time, or the last one before.

n rows asked for   m rows of the sorted log
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from scalerec.data.split import times_of
from scalerec.features.hashing import NO_VALUE, hash_column, mix

NOBODY = np.uint64(2**64 - 1)  # pair of a row without a user or without an item: it belongs to no other row
SCALES = (1e3, 1e-3, 1e6, 1e-6)  # mistaken units: milliseconds or microseconds for seconds, and the reverse


class Keys(NamedTuple):
    """Who, what and when of each row, in the order of the rows or sorted by pair and time."""

    pair: np.ndarray  # [m] uint64 code of user and item, or NOBODY
    time: np.ndarray  # [m] float64 in the log's unit

    @staticmethod
    def of(rows: pa.RecordBatch, user: str, item: str | None, time: str | None, unit: float = 1.0) -> Keys:
        """Of rows with these columns; without an item a row is known by its user, without a time all are at 0.

        Timestamps are counted in `unit` seconds, as the numbers of the other log are.
        """
        pair = hash_column(rows.column(user), user)
        missing = pair == NO_VALUE
        if item is not None:
            of_item = hash_column(rows.column(item), item)
            pair, missing = mix(mix(pair) + of_item), missing | (of_item == NO_VALUE)
        pair = np.where(missing, NOBODY, pair)
        if time is None:
            return Keys(pair, np.zeros(rows.num_rows))
        times = times_of(rows, time)
        return Keys(pair, times / unit if pa.types.is_temporal(rows.schema.field(time).type) else times)

    def take(self, index: np.ndarray) -> Keys:
        return Keys(self.pair[index], self.time[index])

    def order(self) -> np.ndarray:
        """Where each row stands by pair, then time; stable."""
        return np.lexsort((self.time, self.pair))

    @staticmethod
    def cat(parts: list[Keys]) -> Keys:
        if not parts:
            return Keys(np.empty(0, np.uint64), np.empty(0))
        return Keys(*(np.concatenate(values) for values in zip(*parts)))


def last_before(log: Keys, asked: Keys) -> np.ndarray:
    """For each row asked [n] the last one of the sorted log with its pair and a time not later; -1: none."""
    first = np.searchsorted(log.pair, asked.pair, side="left")
    low, high = first.copy(), np.searchsorted(log.pair, asked.pair, side="right")
    high = np.where(asked.pair == NOBODY, first, high)
    while (low < high).any():  # bisection in all ranges at once
        middle = (low + high) // 2
        below = (low < high) & (log.time[np.minimum(middle, len(log.time) - 1)] <= asked.time)
        high = np.where((low < high) & ~below, middle, high)
        low = np.where(below, middle + 1, low)
    return np.where(low > first, low - 1, -1)


def nearest(log: Keys, asked: Keys) -> tuple[np.ndarray, np.ndarray]:
    """For each row asked [n] the one of the sorted log with its pair nearest in time (-1: none), and how much later
    the asked one is."""
    if not len(log.pair):
        return np.full(len(asked.pair), -1), np.full(len(asked.pair), np.inf)
    before = last_before(log, asked)
    start = np.searchsorted(log.pair, asked.pair, side="left")
    after = np.where(before >= 0, before + 1, start)
    inside = np.minimum(after, len(log.pair) - 1)
    there = (after == inside) & (log.pair[inside] == asked.pair) & (asked.pair != NOBODY)
    after = np.where(there, after, -1)
    gap = [np.where(index >= 0, asked.time - log.time[index], np.inf) for index in (before, after)]
    earlier = np.abs(gap[0]) <= np.abs(gap[1])
    return np.where(earlier, before, after), np.where(earlier, gap[0], gap[1])


class Match(NamedTuple):
    """Which row of the sorted log each row asked for is, and what had to be done to its time."""

    index: np.ndarray  # [n] -1: none
    scale: float = 1.0  # the asked times are this many times those of the log
    shift: float = 0.0  # or later by this
    distance: float = float("nan")  # median |difference| in time of what stayed alone though its pair is there


def match(log: Keys, asked: Keys, within: float) -> Match:
    """Join by pair and time up to `within`; where most fail, by a mistaken unit or a constant shift of the time."""
    index, gap = nearest(log, asked)
    joined = np.abs(gap) <= within
    alone = (index >= 0) & ~joined
    found = Match(np.where(joined, index, -1), distance=float(np.median(np.abs(gap[alone]))) if alone.any() else np.nan)
    if joined.sum() >= alone.sum():
        return found
    for scale in SCALES:
        # What the finer unit says of a moment beyond the coarser one is lost in the log.
        slack = max(within, 1.0, 1 / scale)
        index, gap = nearest(log, Keys(asked.pair, asked.time / scale))
        close = (np.abs(gap) <= slack) & (np.abs(asked.time) > 0)
        if close.sum() > (index >= 0).sum() / 2 and _tell(log.time[index[close]], gap[close]):
            return found._replace(index=np.where(close, index, -1), scale=scale)
    index, gap = nearest(log, asked)
    values, counts = np.unique(np.round(gap[alone], 6), return_counts=True)
    shift = float(values[counts.argmax()])
    if counts.max() > max(len(gap[alone]) / 2, 2):
        index, gap = nearest(log, Keys(asked.pair, asked.time - shift))
        return found._replace(index=np.where(np.abs(gap) <= max(within, 1e-6), index, -1), shift=shift)
    return found


def _tell(times: np.ndarray, gap: np.ndarray) -> bool:
    """Whether gaps [n] are small beside the spread of the log's times: counters from 0 to 1 are all close anyhow."""
    return float(np.median(np.abs(gap))) <= times.std() / 10
