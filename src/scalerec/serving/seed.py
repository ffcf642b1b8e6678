"""Fill a store with the histories of a log: replayed by training's code, all users of a part of it at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scalerec import checkpoint
from scalerec.config import component
from scalerec.data.parts import earlier
from scalerec.data.reader import ParquetRows
from scalerec.data.source import Source
from scalerec.data.sources.sequences import Sequences
from scalerec.data.split import PARTS, NoSplit, Part, Split, columns_of
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.features.encoder import Encoder
from scalerec.features.hashing import hash_column, mix
from scalerec.features.lists import lists, whole
from scalerec.inference.rows_of import user_rows
from scalerec.schema import Schema, Sequence
from scalerec.serving.events import SPARE, Checker, Kind, identity, kind, plain, same_identity
from scalerec.serving.states import place
from scalerec.serving.store import Store, open_store

PARTITION_ROWS = 1_000_000  # in memory at a time
USERS_A_PIECE = 10_000
Entries = dict[str, tuple[history.Event, ...]]  # by the name of the sequence; every entry has its time behind the ids


def seed(
    run: str | Path, store: Store, *, parts: tuple[Part, ...] = PARTS, until: Any = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, int]:  # fmt: skip
    """The histories of the log that a run (or its checkpoint) was trained on, into an empty store; counts of them.

    Only of rows of `parts`, and of those only the ones earlier than `until`, a time in the log's unit.
    """
    folder = checkpoint.best(Path(run))
    source = component(json.loads((folder / "config.json").read_text())["data"])
    assert isinstance(source, Source)
    return seed_from(source, store, parts=parts, until=until, progress=progress)


def seed_from(
    source: Source, store: Store, *, parts: tuple[Part, ...] = PARTS, until: Any = None,
    progress: Callable[[str], None] = lambda message: None, partition_rows: int = PARTITION_ROWS,
) -> dict[str, int]:  # fmt: skip
    """`seed` from a source itself."""
    log = _Log.of(source, store.schema, parts, until, progress)
    counts = {"users": 0, "events": 0}
    partitions = max(-(-log.rows.num_rows // partition_rows), 1)

    def pasts() -> Iterator[tuple[Any, history.Past]]:
        for number in range(partitions):
            progress(f"histories: partition {number + 1} of {partitions} (by user)")
            for user, past in log.pasts(number, partitions):
                counts["users"] += 1
                counts["events"] += max(map(len, past.values()), default=0)
                if counts["users"] % 10_000 == 0:
                    progress(f"histories: {counts['users']:,} users")
                yield user, past

    store.load(pasts(), log.kinds())
    progress(f"histories of {counts['users']:,} users, {counts['events']:,} events kept")
    return counts


def write_state(run: str | Path, folder: str | Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """What `serve --state FOLDER` starts from: the histories of a run's log in LMDB, and users.parquet beside them.

    Runs that keep the same histories share them: where they are there already, they stay as they are, since a service
    may be adding to them. users.parquet takes this run's rows. What fails can be repeated.
    """
    found = checkpoint.best(Path(run))
    schema = Encoder.load(found).schema
    where = place(folder, identity(schema))
    users = where / "users.parquet"
    building = users.with_name(".building-users.parquet")
    is_new = not where.exists()
    written: dict[str, Any] = {"state": str(folder)}
    try:
        if users.exists():
            progress(f"{where}: histories are there already and stay as they are; users.parquet takes this run's rows")
            rows = _renewed(users, user_rows(found), schema.user)
            pq.write_table(rows, building, compression="zstd")
        else:
            store = open_store(f"lmdb:{where}", schema)
            try:
                # Written first: histories that are filled, beside no users, would be served as if nobody had columns.
                pq.write_table(user_rows(found), building, compression="zstd")
                counts = seed(found, store, progress=progress)
            finally:
                store.close()
            written |= {"users": counts["users"], "events": counts["events"]}
        os.replace(building, users)
    except BaseException:
        building.unlink(missing_ok=True)
        if is_new:  # what is there already may be a service's
            shutil.rmtree(where, ignore_errors=True)
        raise
    return written


def _renewed(users: Path, rows: pa.Table, user: str) -> pa.Table:
    """The rows of a new run, and what only the file knows: of other users, and in columns that the run does not read.

    Runs of several schemas share a file, so one's columns are not taken away with another's export.
    """
    held = pq.read_table(users)
    old, new = (pa.table({name: whole(one.column(name)) for name in one.column_names}) for one in (held, rows))
    try:
        types = pa.unify_schemas([new.schema, old.schema], promote_options="permissive")
        old, new = (one.cast(pa.schema([types.field(name) for name in one.column_names])) for one in (old, new))
    except pa.ArrowException as error:
        raise InputError(
            f"{users}: holds other types than this run ({str(error).splitlines()[0]}): export into a new --state folder"
        ) from None
    ids, known = whole(old.column(user)), whole(new.column(user))
    at = pc.index_in(known, ids)
    for name in old.column_names:
        if name not in new.column_names:
            new = new.append_column(name, whole(old.column(name)).take(at))
    others = old.filter(pc.invert(pc.is_in(ids, known)))
    return pa.concat_tables([new, others], promote_options="permissive")


class _Log(NamedTuple):
    """The rows of a log that are taken up, and how their users begin."""

    schema: Schema
    rows: pa.Table  # user, time and what events need
    listed: pa.Table | None  # a row a user with lists: the first of all, which says what was before it
    before: pa.Table | None  # events from before the log
    replayed: bool  # the rows have what events need; if not, `listed` has each user's last row, and that is all

    @staticmethod
    def of(source: Source, schema: Schema, parts: tuple[Part, ...], until: Any, progress: Callable) -> _Log:
        if schema.time is None:
            raise InputError("schema: a history needs the events' order: name the `time` column")
        same_identity("the store", identity(schema), source.schema())
        if isinstance(source, Sequences) and source.protocol != "time" and set(parts) != set(PARTS):
            raise InputError(f"protocol {source.protocol!r} has no parts in time: fill from all parts, with `until`")
        inner = source.of if isinstance(source, Sequences) else source
        progress(f"histories: reading the log of {inner.kind}")
        prepared = inner.prepare(progress)
        files = ParquetRows(prepared.files, NoSplit())
        lists = [column for sequence in schema.sequences for column in sequence.list_columns()]
        has_lists = not isinstance(source, Sequences) and set(lists) <= set(files.columns)
        events = history.columns(schema)
        absent = next((column for column in events if column not in files.columns), None)
        if absent and not has_lists:
            raise InputError(f"the log has no column {absent!r}, which the histories need")
        if absent:
            progress(f"the log has no column {absent!r}: histories end before each user's last row")
        wanted: list[str] = list(dict.fromkeys([schema.user, schema.time, *([] if absent else events)]))
        rows, part = _read(files, wanted, inner.parts())
        taken = np.isin(part, [PARTS.index(name) for name in parts])
        taken &= _before(rows, schema, until) if until is not None else True
        at = (_ends(rows, schema, taken) if absent else _begins(rows, schema)) if has_lists else None
        listed = None if at is None else _rows_at(files, [schema.user, *lists], at)
        file = earlier(prepared.files)
        before = None
        if file is not None:
            held = file.read([name for name in file.schema_arrow.names if name in wanted])
            before = pa.table({name: whole(held.column(name)) for name in held.column_names})
        if before is not None and until is not None:
            before = before.filter(pa.array(_before(before, schema, until)))
        return _Log(schema, rows.filter(pa.array(taken)), listed, before, absent is None)

    def kinds(self) -> dict[str, Kind]:
        """What the values of the columns are, where the log has some."""
        found: dict[str, Kind] = {}
        for name in history.columns(self.schema) if self.replayed else []:
            first = self.rows.column(name).drop_null()[:1]
            if len(first):
                found[name] = kind(plain(first[0], name))
        return found

    def pasts(self, number: int, partitions: int) -> Iterator[tuple[Any, history.Past]]:
        """User after user of one partition."""
        listed = None if self.listed is None else _partition(self.listed, self.schema, number, partitions)
        found = _listed(listed, self.schema) if listed is not None else iter(())
        if self.replayed:
            rows = _partition(self.rows, self.schema, number, partitions)
            if self.before is not None:
                before = _partition(self.before, self.schema, number, partitions)
                if listed is not None:  # the lists say it of users who are in the log
                    there = pc.is_in(before.column(self.schema.user), whole(listed.column(self.schema.user)))
                    before = before.filter(pc.invert(there))
                rows = _together([before, rows])
            found = _replayed(rows, self.schema, dict(found))
        for user, entries in found:
            past = _past(entries, self.schema)
            if past:
                yield user, past


def _read(files: ParquetRows, columns: list[str], split: Split) -> tuple[pa.Table, np.ndarray]:
    """The log in the order of the files, and the part [n] of each row as an index into PARTS."""
    tables, parts = [], []
    for piece in files.pieces("train", list(dict.fromkeys([*columns, *columns_of(split)]))):
        tables.append(pa.table({name: whole(piece.rows.column(name)) for name in columns}))
        parts.append(split.part_of(piece.rows, int(piece.index[0])))
    return _together(tables), np.concatenate(parts)


def _rows_at(files: ParquetRows, columns: list[str], at: np.ndarray) -> pa.Table:
    """Some columns of the rows with these numbers; of no other row they are held in memory."""
    tables = []
    for piece in files.pieces("train", columns):
        rows = pa.Table.from_batches([piece.rows]).select(columns).filter(pa.array(np.isin(piece.index, at)))
        tables.append(pa.table({name: whole(rows.column(name)) for name in columns}))
    return _together(tables)


def _together(tables: list[pa.Table]) -> pa.Table:
    """Tables one below the other, moments in UTC without zone, as stores keep them: files may differ in their zones."""
    plain = [
        table.cast(pa.schema([field.with_type(_without_zone(field.type)) for field in table.schema]))
        for table in tables
    ]  # fmt: skip
    return pa.concat_tables(plain, promote_options="permissive")


def _without_zone(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_without_zone(kind.value_type))
    return pa.timestamp(kind.unit) if pa.types.is_timestamp(kind) else kind


def _begins(rows: pa.Table, schema: Schema) -> np.ndarray:
    """The number of each user's first row."""
    order = history.Order.of(rows, schema, "ordered")
    return order.rows[(order.of_user == np.arange(len(order.rows))) & (order.user > 0)]


def _ends(rows: pa.Table, schema: Schema, taken: np.ndarray) -> np.ndarray:
    """The number of each user's last row of those taken [n]."""
    numbers = np.flatnonzero(taken)
    order = history.Order.of(rows.take(pa.array(numbers)), schema, "ordered")
    last = np.append(order.user[1:] != order.user[:-1], True)[: len(order.user)]
    return numbers[order.rows[last & (order.user > 0)]]


def _replayed(rows: pa.Table, schema: Schema, begun: dict[Any, Entries]) -> Iterator[tuple[Any, Entries]]:
    """What `replay` says of every user after his last row: one more row a user, at the end of all times, sees it."""
    assert schema.time is not None
    column = rows.column(schema.user)
    users = pc.unique(pa.chunked_array([*column.chunks, pa.array(list(begun), column.type)])).drop_null()
    times = rows.column(schema.time)
    end = pc.max(times) if len(times) else pa.array([0], times.type)[0]
    last = pa.table({schema.user: users, schema.time: pa.repeat(end, len(users))})
    rows = pa.concat_tables([rows, last], promote_options="permissive")
    twins = {sequence.name: _twin(sequence) for sequence in schema.sequences}
    groups = [
        group.model_copy(update={"features": tuple(twins.get(feature.name, feature) for feature in group.features)})
        for group in schema.groups
    ]
    states = {user: {twins[name].name: entries for name, entries in lists.items()} for user, lists in begun.items()}
    only = np.arange(rows.num_rows - len(users), rows.num_rows)
    timed = schema.model_copy(update={"groups": tuple(groups)})
    for piece in history.replay_pieces(timed, rows, states, USERS_A_PIECE, only=only, ties="ordered"):
        yield from _entries(piece, schema, twins)


def _twin(sequence: Sequence) -> Sequence:
    """The sequence with the times and the spare events that a past has, under a name that no column of a log has."""
    fields = tuple(field.model_copy(update={"column": ""}) for field in sequence.fields)
    name, longer = f"past of {sequence.name}", sequence.max_len + SPARE
    return sequence.model_copy(update={"name": name, "fields": fields, "time": True, "max_len": longer})


def _listed(rows: pa.Table, schema: Schema) -> Iterator[tuple[Any, Entries]]:
    """The lists of the rows themselves."""
    for piece in rows.combine_chunks().to_batches(USERS_A_PIECE):
        yield from _entries(pa.Table.from_batches([piece]), schema, {s.name: s for s in schema.sequences})


def _entries(rows: pa.Table, schema: Schema, listed: dict[str, Sequence]) -> Iterator[tuple[Any, Entries]]:
    """What the list columns of some rows, one a user, hold; `listed` has the sequences as these rows have them."""
    entries: dict[str, list[history.Event]] = {}
    ends: dict[str, list[int]] = {}
    for name, sequence in listed.items():
        columns = []
        for column in sequence.list_columns():
            flat, lengths = lists(whole(rows.column(column)), column)
            columns.append(_values(flat, column))
            ends[name] = np.append(0, np.cumsum(lengths)).tolist()
        if not sequence.time:
            columns.insert(len(sequence.fields), [None] * len(columns[0]))
        entries[name] = list(zip(*columns))
    for i, user in enumerate(whole(rows.column(schema.user)).to_pylist()):
        yield user, {name: tuple(entries[name][ends[name][i] : ends[name][i + 1]]) for name in listed}


def _past(entries: Entries, schema: Schema) -> history.Past:
    """A past of entries that all have their times."""
    past = {}
    for sequence in schema.sequences:
        at, held = len(sequence.fields), entries[sequence.name]
        if held:
            past[sequence.name] = tuple((e[at], e if sequence.time else e[:at] + e[at + 1 :]) for e in held)
    return past


def _values(column: pa.Array, name: str) -> list[Any]:
    """The values as a store keeps them."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", kind.tz), safe=False)
    values = column.to_pylist()
    as_they_are = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind)
    return values if as_they_are else [plain(value, name) for value in values]


def _before(rows: pa.Table, schema: Schema, until: Any) -> np.ndarray:
    """Whether rows [n] are earlier than a time in the unit of the log."""
    assert schema.time is not None
    moment, column = Checker(schema, {}).time(until), rows.column(schema.time)
    try:
        value = pa.scalar(moment, column.type if isinstance(moment, datetime) else None)
        return pc.less(column, value).fill_null(False).to_numpy()
    except (pa.ArrowException, TypeError):
        raise InputError(f"until {until!r}: no time like those in column {schema.time!r} ({column.type})") from None


def _partition(rows: pa.Table, schema: Schema, number: int, partitions: int) -> pa.Table:
    """The rows of some of the users."""
    user = whole(rows.column(schema.user))
    mine = mix(hash_column(user, schema.user)) % np.uint64(partitions) == number
    return rows.filter(pa.array(mine & user.is_valid().to_numpy(zero_copy_only=False)))
