"""The rows of a training log that were also served: found by their keys, read by their place, never all in memory.

m rows of the log whose user and item were exposed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from scalerec.data.reader import ParquetRows
from scalerec.data.split import times_of
from scalerec.errors import InputError
from scalerec.features.hashing import hash_column, mix
from scalerec.schema import Schema
from scalerec.studies.join import NOBODY, Keys, last_before


class TrainingRows:
    """A log's files with an index of the rows whose user and item are among the given pairs."""

    def __init__(self, files: ParquetRows, schema: Schema, pairs: np.ndarray):
        """`pairs` [k] sorted codes, as in Keys."""
        self.files, self.schema = files, schema
        who_what_when = [name for name in (schema.user, schema.item, schema.time) if name is not None]
        absent = [name for name in [*schema.input_columns(), *who_what_when] if name not in files.columns]
        if absent:
            raise InputError(f"training log: no column {absent[0]!r}; it has {', '.join(files.columns[:30])}")
        keys, groups, places = [Keys.cat([])], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number in range(len(files.row_groups)):
            for first, rows in self._read(number, who_what_when):
                found = Keys.of(rows, schema.user, schema.item, schema.time)
                place = np.minimum(np.searchsorted(pairs, found.pair), len(pairs) - 1)
                mine = np.flatnonzero((pairs[place] == found.pair) & (found.pair != NOBODY))
                keys.append(found.take(mine))
                groups.append(np.full(len(mine), number))
                places.append(first + mine)
        whole = Keys.cat(keys)
        order = whole.order()
        self.keys = whole.take(order)  # sorted by pair and time
        self._group, self._row = np.concatenate(groups)[order], np.concatenate(places)[order]

    def take(self, index: np.ndarray, columns: list[str]) -> pa.RecordBatch:
        """The rows at these places of `keys`, in this order; a row group is read once, and of it only they are kept."""
        groups, rows = self._group[index], self._row[index]
        order = np.lexsort((rows, groups))
        found = []
        for number in np.unique(groups):
            wanted = rows[order][groups[order] == number]
            for first, piece in self._read(int(number), columns):
                here = wanted[(wanted >= first) & (wanted < first + piece.num_rows)] - first
                if len(here):
                    found.append(piece.select(columns).take(pa.array(here)))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return together(found).take(pa.array(back))

    def count_between(self, low: float, high: float) -> int:
        """How many rows of the whole log are of a time from `low` to `high`."""
        assert self.schema.time is not None
        times = (times_of(rows, self.schema.time) for rows in self.files.batches("train", [self.schema.time]))
        return sum(int(((some >= low) & (some <= high)).sum()) for some in times)

    def last_times(self, owner: str, column: str, values: np.ndarray, times: np.ndarray) -> np.ndarray:
        """When a column last had a value strictly before a time [k], -inf: never.

        `values` [k] are codes of the owner (a user or an item) and the value, by `owned`.
        """
        assert self.schema.time is not None
        last = np.full(len(values), -np.inf)
        known, asked = np.unique(values), Keys(values, np.nextafter(times, -np.inf))
        for rows in self.files.batches("train", list(dict.fromkeys([owner, column, self.schema.time]))):
            codes = owned(rows.column(owner), rows.column(column))
            mine = np.flatnonzero(np.isin(codes, known))
            if len(mine):
                seen = Keys(codes[mine], times_of(rows, self.schema.time)[mine])
                seen = seen.take(seen.order())
                found = last_before(seen, asked)
                last = np.maximum(last, np.where(found >= 0, seen.time[found], -np.inf))
        return last

    def _read(self, group: int, columns: Sequence[str]) -> Iterable[tuple[int, pa.RecordBatch]]:
        """Pieces of a row group, each with the number of its first row in it."""
        first = 0
        for piece in self.files.pieces("train", columns, [group]):
            yield first, piece.rows
            first += piece.rows.num_rows


def owned(owners: pa.Array, values: pa.Array) -> np.ndarray:
    """One uint64 code [n] of the owner and his value; numbers by what float32 holds of them."""
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float32(), safe=False)
    return mix(mix(hash_column(owners)) + hash_column(values))


def together(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """One batch of all rows; columns that one of them has no value of take the others' type."""
    if len(batches) == 1:
        return batches[0]
    tables = [pa.Table.from_batches([batch]) for batch in batches]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks().to_batches()[0]
