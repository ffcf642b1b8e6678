"""Events on their way into a store: checked, put into the pasts of their users, and written as JSON.

Values are plain: null, whole numbers of 64 bits, numbers, text, moments. Numbers that are not finite are missing, true
is 1, 2.0 is 2 (training reads them so too), and a moment is kept without its zone, in UTC.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Iterable, Mapping
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from scalerec.errors import InputError
from scalerec.features import history
from scalerec.features.encoder import Encoder
from scalerec.schema import Categorical, Schema

SPARE = 32  # events of each sequence beyond its max_len, for those that come late
MAX_TEXT = 4096  # characters of a value
DIGITS = "-0123456789"  # how numbers begin
Kind = Literal["number", "text", "moment"]
Pasts = dict[str, tuple[Any, history.Past]]  # by the user's key: his id and his past


class Event(NamedTuple):
    event_id: str  # unique over all users and all time; the sender makes it
    user: Any
    columns: Mapping[str, Any]  # a row of the log: time, item, labels, whatever the schema's sequences need


class Row(NamedTuple):
    """An event that was checked: plain values only."""

    where: str  # what an error calls it
    digest: bytes  # 128 bits of the event's id
    user: Any
    columns: dict[str, Any]  # those that the sequences need


class Plan(NamedTuple):
    """What a batch of events changes."""

    new: list[bool]  # [events] False where the event is there already
    pasts: Pasts
    digests: list[bytes]  # of the new events


class Checker:
    """Events of one schema to rows."""

    def __init__(self, schema: Schema, kinds: Mapping[str, Kind]):
        """`kinds` says of columns what their values are; of others a user's first value decides."""
        self.schema, self.kinds = schema, kinds
        self.columns = history.columns(schema)
        self._marks = {sequence.where for sequence in schema.sequences if sequence.where}
        self._labels = {label for sequence in schema.sequences for label in sequence.actions}
        self._marks |= {column for label in self._labels for column in schema.counting_columns(label)}

    def rows(self, events: Iterable[Event]) -> list[Row]:
        """All of them, or an InputError that names the event and the field."""
        found = []
        for number, event in enumerate(events):
            where = f"event {number} ({str(event.event_id)[:40]!r})"
            try:
                found.append(self._row(event, where))
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        return found

    def _row(self, event: Event, where: str) -> Row:
        if not isinstance(event.event_id, str) or not event.event_id:
            raise InputError("'event_id' must be a text that is not empty")
        user = plain(event.user, "user")
        if user is None:
            raise InputError("'user' is missing: an event needs the id of its user")
        columns: dict[str, Any] = {}
        for name in self.columns:
            if name in event.columns:
                columns[name] = self._value(event.columns[name], name)
            elif name == self.schema.user:
                columns[name] = user
            else:
                raise InputError(f"no {name!r}, which the schema's sequences need: add it (null if unknown)")
        digest = hashlib.blake2b(_text(event.event_id, "event_id").encode(), digest_size=16).digest()
        return Row(where, digest, user, columns)

    def time(self, value: Any) -> Any:
        """A time of the log as it is kept: a number, or a moment in UTC."""
        name = self.schema.time or "time"
        value = plain(value, name)
        if isinstance(value, str):
            try:
                value = _moment(datetime.fromisoformat(value.replace("Z", "+00:00")))
            except (ValueError, OverflowError):
                hint = "use a number as in the log, or a text as 2024-01-31T12:00:00Z"
                raise InputError(f"{name!r} is {value[:40]!r}, not a time: {hint}") from None
        if value is None:
            raise InputError(f"{name!r} is missing or not finite: every event needs its time, as in the log")
        return value

    def _value(self, value: Any, name: str) -> Any:
        value = self.time(value) if name == self.schema.time else plain(value, name)
        if value is None:
            return None
        found, expected = kind(value), self.kinds.get(name)
        if name in self._marks | self._labels and found != "number":
            raise InputError(f"{name!r} is {found}: it must be a number or a boolean")
        if name in self._labels and value not in (0, 1):
            raise InputError(f"{name!r} is {value}: a label is 0 or 1, null where it is not known")
        if expected is not None and found != expected:
            raise InputError(f"{name!r} is a {found}, the log has a {expected} there")
        return value


def plan(rows: list[Row], schema: Schema, there: Container[bytes], held: Pasts) -> Plan:
    """The pasts after these events, by the ids that are `there` already and the pasts that are `held`.

    Raises:
        InputError: a value is of another kind than in the user's earlier events.
    """
    new: list[bool] = []
    pasts: Pasts = {}
    digests: dict[bytes, None] = {}
    for row in rows:
        repeated = row.digest in digests or row.digest in there
        new.append(not repeated)
        if not repeated:
            key = key_of(row.user)
            before = (pasts.get(key) or held.get(key) or (None, {}))[1]
            _same_kinds(before, row, schema)
            pasts[key] = row.user, history.insert(before, row.columns, schema, SPARE)
            digests[row.digest] = None
    return Plan(new, pasts, list(digests))


def kinds_of(encoder: Encoder) -> dict[str, Kind]:
    """What a fitted encoder can read, for the columns of the log that sequences keep."""
    kinds: dict[str, Kind] = {}
    for sequence in encoder.schema.sequences:
        for field in sequence.fields:
            feature = encoder.schema.feature(field.of)
            if field.of in encoder.vocabularies and isinstance(feature, Categorical):
                integer = encoder.vocabularies[field.of].integer
                kinds[field.event or feature.column or feature.name] = "number" if integer else "text"
    return kinds


# -- values


def plain(value: Any, name: str) -> Any:
    """One value of Python, numpy or Arrow as it is kept; InputError, naming the field, where it cannot be."""
    if isinstance(value, pa.Scalar):
        moment = pa.types.is_timestamp(value.type)
        value = (value.cast(pa.timestamp("us", value.type.tz), safe=False) if moment else value).as_py()
    elif isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str):
        return value if value is None else _text(value, name)
    if isinstance(value, (float, Decimal)):
        if not math.isfinite(value):
            return None
        value = int(value) if value == int(value) else float(value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return float(value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InputError(f"{name!r} is a whole number beyond 64 bits: send it as text")
        return int(value)
    if isinstance(value, date):
        return _moment(value)
    if isinstance(value, float):
        return value
    raise InputError(f"{name!r} is a {type(value).__name__}: it must be one number, text or null")


def kind(value: Any) -> Kind:
    if isinstance(value, datetime):
        return "moment"
    return "text" if isinstance(value, str) else "number"


def key_of(user: Any) -> str:
    """The text by which a user is kept: 1 and "1" are different users, 1 and 1.0 are one."""
    value = plain(user, "user")
    if value is None:
        raise InputError("'user' is missing: name one")
    return json.dumps(value, ensure_ascii=False, default=_packed)


def user_of(key: str | bytes) -> Any:
    """The user of a key."""
    return json.loads(key, object_hook=_unpacked)


def by_text(user: Any) -> tuple[str, bool]:
    """What users are listed by: the text of the id, the number 1 before the text "1"."""
    return str(user), isinstance(user, str)


def beginnings(prefix: str) -> list[str]:
    """How the keys begin of the users whose ids begin with a text: numbers are kept by their digits, text is quoted."""
    prefix = _text(prefix, "prefix")
    numbers = [prefix] if prefix and prefix[0] in DIGITS else [] if prefix else DIGITS
    return ['"' + json.dumps(prefix, ensure_ascii=False)[1:-1], *numbers]


def _text(value: str, name: str) -> str:
    if len(value) > MAX_TEXT:
        raise InputError(f"{name!r} is a text of {len(value)} characters: at most {MAX_TEXT} are kept")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name!r} is not valid text: it has half of a surrogate pair") from None
    return value


def _moment(value: date) -> datetime:
    if not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day)
    try:
        value = value.astimezone(timezone.utc) if value.tzinfo else value
    except OverflowError:
        raise InputError(f"{value} is not a time that UTC has") from None
    return datetime(*value.timetuple()[:6], value.microsecond)  # of pandas' subclass too


def _same_kinds(past: history.Past, row: Row, schema: Schema) -> None:
    """What was read as a number must stay one: a list of both cannot be encoded, and would end all of his requests."""
    time = next((events[-1][0] for events in past.values() if events), None)
    if schema.time and time is not None and kind(time) != kind(row.columns[schema.time]):
        now = kind(row.columns[schema.time])
        raise InputError(
            f"{row.where}: {schema.time!r} is a {now}, but in the user's earlier events it is a {kind(time)}"
        )
    for sequence in schema.sequences:
        for i, name in enumerate(history.entry_columns(sequence, schema)):
            value = row.columns[name]
            if value is None:
                continue
            events = past.get(sequence.name, ())
            earlier = next((entry[i] for _, entry in reversed(events) if entry[i] is not None), None)
            if earlier is not None and kind(earlier) != kind(value):
                what = f"{name!r} is a {kind(value)}, but in the user's earlier events it is a {kind(earlier)}"
                raise InputError(f"{row.where}: {what}")


# -- JSON


def pack(user: Any, past: history.Past, schema: Schema) -> bytes:
    """A user's past as JSON: {"user": id, "past": {sequence: [[*entry, time], ...]}}."""
    timed = {sequence.name: sequence.time for sequence in schema.sequences}
    # An entry that keeps its time does not need it twice.
    lists = {name: [e if timed[name] else (*e, t) for t, e in events] for name, events in past.items()}
    text = json.dumps({"user": user, "past": lists}, ensure_ascii=False, separators=(",", ":"), default=_packed)
    return text.encode()


def unpack(data: bytes, schema: Schema) -> tuple[Any, history.Past]:
    held = json.loads(data, object_hook=_unpacked)
    past = {}
    for sequence in schema.sequences:
        at = len(sequence.fields)
        rows = held["past"].get(sequence.name)
        if rows:
            timed = [(row[at], tuple(row)) for row in rows] if sequence.time else [(r[-1], tuple(r[:-1])) for r in rows]
            past[sequence.name] = tuple(timed)
    return held["user"], past


def _packed(value: Any) -> Any:
    assert isinstance(value, datetime)
    return {"moment": value.isoformat()}


def _unpacked(value: dict[str, Any]) -> Any:
    return datetime.fromisoformat(value["moment"]) if value.keys() == {"moment"} else value


def identity(schema: Schema) -> str:
    """What a store's pasts depend on, as JSON; another schema's store is refused."""
    sequences = {
        sequence.name: {
            "columns": history.entry_columns(sequence, schema), "time": sequence.time, "where": sequence.where,
            "runs": sequence.runs, "max_len": sequence.max_len,
            "counted": {label: schema.counting_columns(label) for label in sequence.actions},
        }
        for sequence in schema.sequences
    }  # fmt: skip
    return json.dumps({"user": schema.user, "time": schema.time, "unit": schema.time_unit, "sequences": sequences})


def same_identity(where: str, held: str, schema: Schema) -> None:
    """InputError, naming the first difference, unless the store at `where` is one of this schema."""
    mine, theirs = json.loads(identity(schema)), json.loads(held)
    if mine == theirs:
        return
    what = next((key for key in ("user", "time", "unit") if mine[key] != theirs[key]), "")
    what = f"its {what} is" if what else ""
    if not what:
        names = {**mine["sequences"], **theirs["sequences"]}
        name = next((n for n in names if mine["sequences"].get(n) != theirs["sequences"].get(n)), None)
        what = f"sequence {name!r} is" if name else "the order of sequences is"
    raise InputError(f"{where}: holds histories of another schema ({what} another): use another store or a new one")
