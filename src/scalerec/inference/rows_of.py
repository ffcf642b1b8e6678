"""What a training log knows of each item and each user: the columns that serving adds to a request.

A column of the item side belongs to the item when the item decides its value, and to the moment otherwise (a placement,
a price at the time). That is measured, not declared: no schema says it, and a wrong guess would serve a stale value.

n rows
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scalerec import checkpoint
from scalerec.checkpoint import Checkpoint
from scalerec.config import component
from scalerec.data.reader import ParquetRows
from scalerec.data.source import Source
from scalerec.data.split import times_of
from scalerec.errors import InputError
from scalerec.features.hashing import NO_VALUE, hash_column, mix
from scalerec.features.lists import lists, whole
from scalerec.features.numeric import numbers, transform
from scalerec.schema import Categorical, Numeric, Schema, Sequence, Side, reads

POPULARITY = "popularity"  # column of the items: how many training rows show the item
POPULARITY_BESIDE = "#popularity"  # its name where the schema reads a column of the log that has the other one
MEASURED = 1_000_000  # of the latest rows it is measured what belongs to the item
SAME, EXPLAINED = 0.9, 0.5  # share of rows with their item's usual value; share of a number's variance


class ItemRows(NamedTuple):
    """What is known of every item, and what the moment brings where a request does not say it."""

    items: pa.Table  # item column, columns that belong to the item, popularity; most popular first
    context: dict[str, Any]  # column -> default
    types: dict[str, str]  # the time, and every column that features read -> its type in the log


def item_rows(run: Path | Checkpoint) -> ItemRows:
    """The items of a run's training log with the latest value of each column of theirs, read once in constant memory.

    Raises:
        InputError: no run there, its data cannot be read, or its schema names no item.
    """
    saved = run if isinstance(run, Checkpoint) else checkpoint.load(run)
    schema = saved.encoder.schema
    if schema.item is None:
        raise InputError(f"{saved.folder}: its schema names no `item`, so there is nothing to serve: add it and train")
    columns = _columns_of(schema, "item")
    log = training_log(saved)
    popularity, latest, recent = Counter(), _Latest(schema.item), _Recent()
    shown = _shown_sequence(schema)
    found = pq.read_schema(log.row_groups[0].file)
    read = [*schema.input_columns(), *([schema.time] if schema.time else [])]  # requests have a time in any case
    types = {name: str(found.field(name).type) for name in read if name in found.names}
    more = [name for name in (schema.new_events, schema.time) if name]
    lists_of = [] if shown is None else shown.list_columns()
    wide = [name for name, kind in types.items() if "uint64" in kind]
    for rows in log.batches("train", list(dict.fromkeys([schema.item, *columns, *lists_of, *more, *wide]))):
        for name in wide:
            _servable(rows.column(name), name)
        times = times_of(rows, schema.time) if schema.time else None
        if shown is not None:
            events, event_times, seen = _events(rows, schema, shown, columns, times)
            popularity.update(seen)
            complete = set(columns) <= set(events.schema.names)
            # A past that does not keep all columns only says that the item is there: any row of the log knows more.
            latest.add(events, event_times if complete else np.full(len(events), -np.inf))
            if complete:
                recent.add(events, event_times)
        kept = rows.select([schema.item, *columns])
        popularity.update(_counts(kept.column(0)))
        latest.add(kept, times)
        recent.add(kept, times)
    if not popularity:
        raise InputError(f"{saved.folder}: the training part of its log holds no item")
    own, context = _apart(recent.table(), schema, columns)
    items = latest.table().select([schema.item, *own])
    known = items.column(schema.item).to_pylist()
    counts = np.array([popularity.get(item, 0) for item in known], np.int64)
    name = POPULARITY_BESIDE if POPULARITY in schema.input_columns() else POPULARITY
    items = items.append_column(name, pa.array(counts))
    return ItemRows(items.take(pa.array(np.argsort(-counts, kind="stable"))), context, types)


def _servable(column: pa.Array, name: str) -> None:
    """InputError where a whole number is larger than a request may bring."""
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    column = column.flatten() if pa.types.is_nested(column.type) else column
    largest = pc.max(column).as_py() or 0
    if largest >= 2**63:
        raise InputError(
            f"column {name!r} holds {largest}: a service takes whole numbers below 2^63; write the column as text or "
            "as int64 and train again"
        )


def user_rows(run: Path | Checkpoint) -> pa.Table:
    """The users of a run's training log with the latest value of each user-side column, histories left out."""
    saved = run if isinstance(run, Checkpoint) else checkpoint.load(run)
    schema = saved.encoder.schema
    columns, latest = list(_columns_of(schema, "user")), _Latest(schema.user)
    wanted = [schema.user, *columns, *([schema.time] if schema.time else [])]
    for rows in training_log(saved).batches("train", wanted):
        latest.add(rows.select([schema.user, *columns]), times_of(rows, schema.time) if schema.time else None)
    return latest.table()


def training_log(saved: Checkpoint) -> ParquetRows:
    """The log that a checkpoint was trained on; InputError when it is not on this machine."""
    try:
        source = component(saved.run["data"])
    except ValueError as error:
        raise InputError(f"{saved.folder}: {str(error).splitlines()[0]}") from None
    assert isinstance(source, Source)
    return ParquetRows.of(source, source.prepare(), skip_bad_shards=bool(saved.run.get("skip_bad_shards")))


def _columns_of(schema: Schema, side: Side) -> dict[str, Numeric | None]:
    """The columns that a side's features read, with the numeric feature that does; neither ids, times nor histories.

    A column that both sides read (a cross of user and item) is the user's.
    """
    found: dict[str, Numeric | None] = {}
    for feature in (f for group in schema.groups if group.side == side for f in group.features):
        if isinstance(feature, Sequence):
            continue
        for column in reads(feature):
            found[column] = feature if isinstance(feature, Numeric) else found.get(column)
    not_mine = {schema.user, schema.item, schema.time, *(_columns_of(schema, "user") if side == "item" else ())}
    return {column: feature for column, feature in found.items() if column not in not_mine}


# -- the latest rows, of all and of each key


class _Latest:
    """The last row of each key by time (by place where there is none), whatever the number of rows."""

    def __init__(self, key: str):
        self.key = key
        self.parts: list[pa.Table] = []
        self.kept = self.held = 0

    def add(self, rows: pa.RecordBatch, times: np.ndarray | None) -> None:
        self.parts.append(_timed(rows, times))
        self.held += len(rows)
        if self.held > max(MEASURED // 4, 3 * self.kept):
            self._compact()

    def table(self) -> pa.Table:
        """One row a key, in the order of their rows."""
        self._compact()
        return self.parts[0].drop_columns(["#time"])

    def _compact(self) -> None:
        if not self.parts:
            raise InputError("the training part of the log holds no rows")
        held = pa.concat_tables(self.parts, promote_options="permissive").combine_chunks()
        keys = whole(held.column(self.key)).dictionary_encode()
        codes = keys.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        order = np.argsort(held.column("#time").to_numpy(), kind="stable")
        order = order[codes[order] >= 0]
        last = np.full(len(keys.dictionary), -1, np.int64)
        last[codes[order]] = order  # of equal indices the last one stays
        self.parts = [held.take(pa.array(np.sort(last[last >= 0])))]
        self.kept = self.held = len(self.parts[0])


class _Recent:
    """The latest MEASURED rows."""

    def __init__(self) -> None:
        self.parts: list[pa.Table] = []
        self.held = 0

    def add(self, rows: pa.RecordBatch, times: np.ndarray | None) -> None:
        self.parts.append(_timed(rows, times))
        self.held += len(rows)
        if self.held > 2 * MEASURED:
            self.parts = [self.table()]
            self.held = len(self.parts[0])

    def table(self) -> pa.Table:
        held = pa.concat_tables(self.parts, promote_options="permissive").combine_chunks()
        latest = np.argsort(held.column("#time").to_numpy(), kind="stable")[-MEASURED:]
        return held.take(pa.array(np.sort(latest)))


def _timed(rows: pa.RecordBatch, times: np.ndarray | None) -> pa.Table:
    column = pa.array(np.zeros(len(rows)) if times is None else times, pa.float64())
    return pa.Table.from_batches([rows]).append_column("#time", column)


# -- training rows that stand for many events: items that are shown only in their pasts


def _shown_sequence(schema: Schema) -> Sequence | None:
    """The sequence whose last events are training targets beside the row; None where every event is a row."""
    for sequence in schema.sequences if schema.new_events else ():
        feature = schema.feature(sequence.fields[0].of)
        assert isinstance(feature, Categorical)
        if not sequence.runs and (feature.column or feature.name) == schema.item:
            return sequence
    return None


def _events(
    rows: pa.RecordBatch, schema: Schema, sequence: Sequence, columns: Iterable[str], times: np.ndarray | None
) -> tuple[pa.RecordBatch, np.ndarray | None, Counter]:
    """The rows' past events as rows of the log, with the columns a past keeps; their times; new ones, counted."""
    assert schema.item is not None and schema.new_events is not None
    new = np.nan_to_num(numbers(rows.column(schema.new_events), schema.new_events)[0]).astype(np.int64)
    found: dict[str, pa.Array] = {}
    lengths = np.zeros(len(rows), np.int64)
    for field in sequence.fields:
        feature = schema.feature(field.of)
        assert isinstance(feature, Categorical)
        column = feature.column or feature.name
        flat, lengths = lists(rows.column(sequence.column(field)), sequence.column(field))
        if column == schema.item or column in columns:
            found[column] = flat.cast(whole(rows.column(column)).type)
    to_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    counted = _counts(found[schema.item].filter(pa.array(to_end <= np.repeat(new, lengths))))
    if times is not None:
        times = np.repeat(times, lengths)
        if sequence.time_column is not None:
            kept = pa.record_batch({"time": lists(rows.column(sequence.time_column), sequence.time_column)[0]})
            times = times if kept.column(0).null_count else times_of(kept, "time")
    return pa.record_batch(found), times, counted


def _counts(column: pa.Array) -> Counter:
    """How often each value occurs, nulls left out."""
    found = whole(column).drop_null().value_counts()
    return Counter(dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist())))


# -- what belongs to the item


def _apart(recent: pa.Table, schema: Schema, columns: dict[str, Numeric | None]) -> tuple[list[str], dict[str, Any]]:
    """The columns that belong to the item, and the default of each of the others: its mode, or its median."""
    assert schema.item is not None
    item = np.unique(value_codes(whole(recent.column(schema.item)), schema.item), return_inverse=True)[1]
    own, context = [], {}
    for name, feature in columns.items():
        column = whole(recent.column(name))
        if feature is None:
            codes = value_codes(column, name)
            if usual_share(item, codes) >= SAME:
                own.append(name)
            else:
                values, first, counts = np.unique(codes, return_index=True, return_counts=True)
                context[name] = _for_json(column[int(first[counts.argmax()])].as_py(), name)
            continue
        values = numbers(column, name)[0]
        if explained_share(item, transform(values, feature.log)) >= EXPLAINED:
            own.append(name)
        else:
            present = np.sort(values[~np.isnan(values)])
            median = present[(len(present) - 1) // 2].item() if len(present) else None  # a value that occurred
            context[name] = int(median) if median is not None and pa.types.is_integer(column.type) else median
    return own, context


def _for_json(value: Any, name: str) -> Any:
    """A default as the manifest can hold it: dates and decimals by their text, which is what is encoded of them."""
    if isinstance(value, (datetime, bytes)):
        raise InputError(f"column {name!r} holds {type(value).__name__} values that are not the item's own: cast it")
    return str(value) if isinstance(value, (date, Decimal)) else value


def usual_share(item: np.ndarray, value: np.ndarray) -> float:
    """The share of rows [n] whose value is their item's most common one, among items with several rows; 1 without."""
    rows = np.bincount(item)[item] > 1
    if not rows.any():
        return 1.0
    values = np.unique(value[rows], return_inverse=True)[1].astype(np.int64)
    pairs, counts = np.unique(item[rows].astype(np.int64) * (values.max() + 1) + values, return_counts=True)
    best = np.zeros(item.max() + 1, np.int64)
    np.maximum.at(best, pairs // (values.max() + 1), counts)
    return float(best.sum() / rows.sum())


def explained_share(item: np.ndarray, value: np.ndarray) -> float:
    """The share of the variance of numbers [n], NaN left out, that the item explains (adjusted R^2); 1 for a constant.

    Adjusted, and over items with several rows, because few rows an item would explain any noise.
    """
    present = ~np.isnan(value)
    item, value = item[present], value[present]
    rows = np.bincount(item)[item] > 1 if len(item) else present[:0]
    item, value = np.unique(item[rows], return_inverse=True)[1], value[rows]
    if not len(value):
        return 1.0
    counts = np.bincount(item)
    total = ((value - value.mean()) ** 2).sum() / (len(value) - 1)
    within = ((value - (np.bincount(item, value) / counts)[item]) ** 2).sum() / (len(value) - len(counts))
    return 1.0 if total <= 1e-12 * max(value.mean() ** 2, 1e-300) else float(1 - within / total)


def value_codes(column: pa.Array, name: str) -> np.ndarray:
    """A uint64 code [n] for each value, lists included."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return hash_column(column, name)
    flat, lengths = lists(column, name)
    starts = np.cumsum(lengths) - lengths
    codes = hash_column(flat, name) if len(flat) else np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        place = np.arange(len(codes)) - np.repeat(starts, lengths)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix(codes + mix(place)), dtype=np.uint64)])
        found = mix(sums[starts + lengths] - sums[starts] + lengths.astype(np.uint64))
    return np.where(column.is_null().to_numpy(zero_copy_only=False), NO_VALUE, found)
