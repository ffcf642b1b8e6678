"""What had happened before each row: sums over the strictly earlier rows of the same key, never the row itself."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


class Earlier:
    """The rows of a log by key and time; of equal times none is earlier than another."""

    def __init__(self, keys: np.ndarray, times: np.ndarray):
        """keys [n] integers, negative where the key is unknown (such rows have no past); times [n]."""
        self._order = np.lexsort((times, keys))
        keys, self._times = keys[self._order], times[self._order]
        self._known = keys >= 0
        new_key = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        new_time = new_key | np.append(True, self._times[1:] != self._times[:-1])[: len(keys)]
        places = np.arange(len(keys))
        self._first = np.maximum.accumulate(np.where(new_key, places, 0))
        self._until = np.maximum.accumulate(np.where(new_time, places, 0))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum [n] of the values [n] (integers or booleans) of the earlier rows."""
        total = np.append(0, np.cumsum(values[self._order], dtype=np.int64))
        return self._by_row(np.where(self._known, total[self._until] - total[self._first], 0))

    def count(self) -> np.ndarray:
        """How many earlier rows there are [n]."""
        return self._by_row(np.where(self._known, self._until - self._first, 0))

    def time(self) -> np.ndarray:
        """The time of the last earlier row [n], NaN where there is none."""
        found = self._known & (self._until > self._first)
        return self._by_row(np.where(found, self._times[self._until - 1], np.nan))

    def _by_row(self, sorted_values: np.ndarray) -> np.ndarray:
        values = np.empty_like(sorted_values)
        values[self._order] = sorted_values
        return values


def codes(*columns: pa.ChunkedArray) -> np.ndarray:
    """One integer [n] for each combination of values, negative where one of them is null."""
    combined = np.zeros(len(columns[0]), np.int64)
    missing = np.zeros(len(columns[0]), bool)
    for column in columns:
        encoded = column.combine_chunks().dictionary_encode()
        index = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        missing |= index < 0
        combined = combined * (len(encoded.dictionary) + 1) + index
    return np.where(missing, -1, combined)


def rate(events: np.ndarray, count: np.ndarray, expected: np.ndarray | float, strength: float = 10.0) -> np.ndarray:
    """events / count [n] as float32, drawn to the `expected` rate as if `strength` more rows had shown it."""
    return ((events + strength * expected) / (count + strength)).astype(np.float32)
