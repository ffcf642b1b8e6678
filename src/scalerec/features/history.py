"""A user's past, kept in one place: `append` takes one event online, `replay` takes a whole log and gives the same.

A state holds, for every sequence of the schema, the user's last `max_len` events, oldest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.errors import InputError
from scalerec.features.numeric import numbers
from scalerec.schema import Categorical, Schema, Sequence

Event = tuple[Any, ...]  # one value for each field of the sequence, then the time and the actions that it keeps
State = Mapping[str, tuple[Event, ...]]  # by the name of the sequence; never changed in place
Past = Mapping[str, tuple[tuple[Any, Event], ...]]  # every event with its time (None: the first)


def append(state: State, event: Mapping[str, Any], schema: Schema) -> State:
    """The state after one event (a row of the log); an event that no sequence keeps leaves it as it was.

    Events come in the order of their times: the encoder refuses a history that goes back.
    A sequence keeps an event when its `where` column is true and its first id is not null (and, where it keeps runs
    only, not the last one's); other ids may be null. An action is null where no task counts the event.
    """
    after = dict(state)
    for sequence, entry in _entries(event, schema):
        past = after.get(sequence.name, ())
        if not (sequence.runs and past and past[-1][0] == entry[0]):
            after[sequence.name] = (*past, entry)[-sequence.max_len :]
    return after


def insert(past: Past, event: Mapping[str, Any], schema: Schema, spare: int) -> Past:
    """The past after one event that may come late: it stands behind all that are not later than itself.

    A past holds more events than a state, so that `until` can leave out those of the latest time: all of these (up to
    a thousand), at least `spare`. Of a series of runs it also holds the last `spare` events that repeat an id, since
    what comes late may part them.
    """
    after = dict(past)
    time = event[schema.time] if schema.time else None
    for sequence, entry in _entries(event, schema):
        events = list(after.get(sequence.name, ()))
        place = len(events)
        while place and time is not None and events[place - 1][0] is not None and events[place - 1][0] > time:
            place -= 1
        events.insert(place, (time, entry))
        if sequence.runs:
            ids = [entry[0] for _, entry in events]
            settled = len(events) - spare
            events = [e for i, e in enumerate(events) if not 0 < i < settled or ids[i] != ids[i - 1]]
        latest = 0 if time is None else sum(other == events[-1][0] for other, _ in events[-1000:])
        after[sequence.name] = tuple(events[-(sequence.max_len + max(spare, latest)) :])
    return after


def until(past: Past, schema: Schema, before: Any = None) -> State:
    """The state that `append` gives for the events of a past in order; only for those earlier than `before`."""
    state = {}
    for sequence in schema.sequences:
        kept = past.get(sequence.name, ())
        entries = [entry for time, entry in kept if before is None or time is None or time < before]
        if sequence.runs:
            entries = [entry for i, entry in enumerate(entries) if not i or entry[0] != entries[i - 1][0]]
        if entries:
            state[sequence.name] = tuple(entries[-sequence.max_len :])
    return state


def columns(schema: Schema) -> list[str]:
    """The columns of the log that an event must bring for the schema's sequences."""
    needed: list[str] = []
    for sequence in schema.sequences:
        needed += [*([sequence.where] if sequence.where else []), *entry_columns(sequence, schema)]
        needed += [column for label in sequence.actions for column in schema.counting_columns(label)]
    return list(dict.fromkeys([*needed, *([schema.time] if needed and schema.time else [])]))


def as_columns(state: State, schema: Schema) -> dict[str, list[Any]]:
    """The state as one row's list columns, ready to be encoded."""
    lists: dict[str, list[Any]] = {}
    for sequence in schema.sequences:
        entries = state.get(sequence.name, ())[-sequence.max_len :]
        for i, column in enumerate(sequence.list_columns()):
            lists[column] = [entry[i] for entry in entries]
    return lists


def replay(schema: Schema, rows: pa.Table, initial: Mapping[Any, State] | None = None) -> pa.Table:
    """`rows` with the list columns of every sequence added, each row seeing its user's strictly earlier events.

    Rows may come in any order and keep it. Events of a user with equal times do not see each other and enter the past
    in the order of the rows. `initial` gives users a past from before the first row.
    """
    return pa.concat_tables(replay_pieces(schema, rows, initial))


def replay_pieces(
    schema: Schema, rows: pa.Table, initial: Mapping[Any, State] | None = None, size: int = 65_536, *,
    only: np.ndarray | None = None, ties: Literal["hidden", "ordered"] = "hidden",
) -> Iterator[pa.Table]:  # fmt: skip
    """`replay`, `size` rows at a time: the lists of one piece only are in memory.

    Of all rows, or of the rows `only` [m]; with `ties` ordered a row also sees the events of its own time before it.
    """
    order = Order.of(rows, schema, ties)
    pasts = [_Past.of(rows, schema, sequence, order, initial or {}) for sequence in schema.sequences]
    wanted = np.arange(rows.num_rows) if only is None else only
    for first in range(0, max(len(wanted), 1), size):
        chosen = wanted[first : first + size]
        piece = rows.slice(first, size) if only is None else rows.take(pa.array(chosen))
        for past in pasts:
            for name, lists in past.lists(chosen).items():
                piece = piece.append_column(name, lists)
        yield piece


@dataclass(frozen=True)
class Order:
    """The rows by user, then time, then file order (stable); positions below are places in this order."""

    users: pa.Array  # the different users
    rows: np.ndarray  # [n] row at each position
    user: np.ndarray  # [n] at each position: index into `users` + 1, 0 where the user is null
    of_user: np.ndarray  # [n] the user's first position
    of_time: np.ndarray  # [n] the position before which all is the row's past: the first one of this user and time

    @staticmethod
    def of(rows: pa.Table, schema: Schema, ties: str) -> Order:
        if schema.time is None:
            raise InputError("schema: a history needs the events' order: name the `time` column")
        encoded = _column(rows, schema.user).dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
        times = _times(rows, schema.time)
        order = np.lexsort((times, codes))
        codes, times = codes[order], times[order]
        new_user = np.append(True, codes[1:] != codes[:-1])[: len(codes)]
        new_time = new_user | np.append(True, times[1:] != times[:-1])[: len(codes)]
        past = last_true(new_time) if ties == "hidden" else np.arange(len(codes))
        return Order(encoded.dictionary, order, codes, last_true(new_user), past)


@dataclass(frozen=True)
class _Past:
    """One sequence: all kept events of all users, user by user, and which stretch of them each row sees."""

    columns: list[str]  # the list columns
    values: list[pa.Array]  # for each list column: the initial values, then the log's column
    events: np.ndarray  # [kept events] index into `values`
    start: np.ndarray  # [rows] first event that the row sees
    end: np.ndarray  # [rows]

    @staticmethod
    def of(rows: pa.Table, schema: Schema, sequence: Sequence, order: Order, initial: Mapping[Any, State]) -> _Past:
        logged = [_column(rows, column) for column in _event_columns(sequence, schema)]
        logged += [_action(rows, label, schema) for label in sequence.actions]
        before = [initial.get(user, {}).get(sequence.name, ())[-sequence.max_len :] for user in order.users.to_pylist()]
        entries = [entry for events in before for entry in events]
        values = [
            pa.concat_arrays([pa.array([entry[i] for entry in entries], type=column.type), column])
            for i, column in enumerate(logged)
        ]
        held = np.array([0, *(len(events) for events in before)], np.int64)  # by user, as in order.user
        held_until = np.cumsum(held)
        kept = (_kept(rows, sequence) & logged[0].is_valid().to_numpy(zero_copy_only=False))[order.rows]
        kept &= order.user > 0
        if sequence.runs:
            kept &= _changes(values[0], order, kept, held_until, len(entries))
        kept_before = np.append(0, np.cumsum(kept))
        end = kept_before[order.of_time] + held_until[order.user]
        begin = kept_before[order.of_user] + (held_until - held)[order.user]

        events = np.empty(len(entries) + int(kept_before[-1]), np.int64)
        events[(kept_before[:-1] + held_until[order.user])[kept]] = order.rows[kept] + len(entries)
        first_kept = np.zeros(len(held), np.int64)  # kept events of the log that stand before this user's
        first_kept[order.user] = kept_before[order.of_user]
        events[np.repeat(first_kept, held) + np.arange(len(entries))] = np.arange(len(entries))

        past = _Past(sequence.list_columns(), values, events, np.empty_like(begin), np.empty_like(end))
        past.start[order.rows] = np.maximum(begin, end - sequence.max_len)
        past.end[order.rows] = end
        return past

    def lists(self, rows: np.ndarray) -> dict[str, pa.Array]:
        """The list columns of these rows."""
        start = self.start[rows]
        lengths = self.end[rows] - start
        offsets = np.append(0, np.cumsum(lengths))
        seen = self.events[np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)]
        limits = pa.array(offsets.astype(np.int32))
        return {
            column: pa.ListArray.from_arrays(limits, values.take(pa.array(seen)))
            for column, values in zip(self.columns, self.values)
        }


def entry_columns(sequence: Sequence, schema: Schema) -> list[str]:
    """The columns of the log whose values make an entry, in its order."""
    return [*_event_columns(sequence, schema), *sequence.actions]


def _entries(event: Mapping[str, Any], schema: Schema) -> Iterator[tuple[Sequence, Event]]:
    """The sequences that keep an event, each with what it keeps of it."""
    for sequence in schema.sequences:
        if sequence.where and not event.get(sequence.where):
            continue
        columns = _event_columns(sequence, schema)
        counting = [column for label in sequence.actions for column in (label, *schema.counting_columns(label))]
        absent = next((column for column in (*columns, *counting) if column not in event), None)
        if absent is not None:
            raise InputError(f"event: no {absent!r}, which sequence {sequence.name!r} needs: add it (null if unknown)")
        if event[columns[0]] is not None:
            counted = [_counted(label, schema, lambda name: pa.array([event[name]])) for label in sequence.actions]
            actions = [event[label] if known else None for label, known in zip(sequence.actions, counted)]
            yield sequence, (*(event[column] for column in columns), *actions)


def _event_columns(sequence: Sequence, schema: Schema) -> list[str]:
    """The columns of the log that an entry begins with: the fields' ids, then the time; its actions follow."""
    columns = []
    for field in sequence.fields:
        feature = schema.feature(field.of)
        assert isinstance(feature, Categorical)  # the schema saw to it
        columns.append(field.event or feature.column or feature.name)
    if sequence.time:
        if schema.time is None:
            raise InputError(f"schema: sequence {sequence.name!r} keeps times: name the `time` column")
        columns.append(schema.time)
    return columns


def _counted(label: str, schema: Schema, column: Callable[[str], pa.Array]) -> np.ndarray | np.bool_:
    """Whether a task counts the label [n]: its mask and its weight, where it has them, are neither 0 nor missing."""
    counts = [np.nan_to_num(numbers(column(name), name)[0]) != 0 for name in schema.counting_columns(label)]
    return np.all(counts, axis=0)


def _action(rows: pa.Table, label: str, schema: Schema) -> pa.Array:
    """A label column, null where no task counts it."""
    labels = _column(rows, label)
    counted = np.broadcast_to(_counted(label, schema, lambda name: _column(rows, name)), len(labels))
    return labels if counted.all() else labels.take(pa.array(np.arange(len(labels)), mask=~counted))


def _column(rows: pa.Table, name: str) -> pa.Array:
    if name not in rows.column_names:
        raise InputError(f"history: no column {name!r} in the rows: it has {', '.join(rows.column_names[:20])}")
    column = rows.column(name).combine_chunks()
    if pa.types.is_floating(column.type):
        finite = pc.is_finite(column)
        if not pc.all(finite).as_py():  # missing, as a store takes them
            column = pc.if_else(finite, column, pa.scalar(None, column.type))
    return column


def _times(rows: pa.Table, name: str) -> np.ndarray:
    """A time column [n] as numbers that sort like it."""
    column = _column(rows, name)
    if column.null_count:
        raise InputError(f"history: column {name!r} has {column.null_count} rows without a time: drop them")
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    elif pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms")).cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise InputError(f"history: column {name!r} is {column.type}, not a time: use a number, a date or a timestamp")
    return column.to_numpy(zero_copy_only=False)


def _kept(rows: pa.Table, sequence: Sequence) -> np.ndarray:
    """Whether the sequence's `where` column is true [n]."""
    if not sequence.where:
        return np.ones(rows.num_rows, bool)
    column = _column(rows, sequence.where)
    kind = column.type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(f"history: column {sequence.where!r} is {kind}: `where` needs a number or a boolean")
    if not pa.types.is_boolean(kind):
        column = pc.not_equal(column, pa.scalar(0, kind))
    return column.fill_null(False).to_numpy(zero_copy_only=False)


def _changes(values: pa.Array, order: Order, kept: np.ndarray, held_until: np.ndarray, initial: int) -> np.ndarray:
    """Whether the id of each kept position [n] differs from the one its user had before it."""
    codes = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    at = np.flatnonzero(kept)
    users, ids = order.user[at], codes[order.rows[at] + initial]
    held = np.diff(held_until, prepend=0)[users] > 0
    before = np.where(held, codes[held_until[users] - 1], -1)  # of the initial state's last event
    follows = np.append(False, users[1:] == users[:-1])[: len(at)]
    before[follows] = np.roll(ids, 1)[follows]
    changed = np.zeros(len(kept), bool)
    changed[at] = ids != before
    return changed


def last_true(starts: np.ndarray) -> np.ndarray:
    """For each position [n] the nearest position at or before it where `starts` is true."""
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
