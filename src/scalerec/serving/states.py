"""The stores behind a service: models whose schemas keep the same histories share one, others have one of their own.

An event goes to every store, so that each model finds the history it was trained on; its id makes a second try safe.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scalerec.errors import InputError
from scalerec.schema import Schema
from scalerec.serving import logs
from scalerec.serving.columns import Columns, check
from scalerec.serving.events import Event, identity
from scalerec.serving.requests import Event as EventRequest
from scalerec.serving.requests import Refused
from scalerec.serving.store import Remembered, Store, StoreUnavailable, open_store

Open = Callable[[str, Schema, Mapping[str, Any]], Store]


Row = Callable[[Any], dict[str, Any]]  # the columns of an item, {} where it is unknown


@dataclass
class Kept:
    """One store, and what its events have to bring."""

    identity: str
    store: Store
    local: bool  # answers in microseconds: may be asked on the event loop
    models: dict[str, tuple[Columns, Row]]  # those that read from it, by name
    health: logs.Once = field(default_factory=lambda: logs.Once("store"))
    well: bool = True  # as of the last look

    @property
    def columns(self) -> Columns:
        """Those of the first model: what histories are made of is the same for all."""
        return next(iter(self.models.values()))[0]

    def row(self, item: Any) -> dict[str, Any]:
        """An item as the first model knows it that knows it at all: the others may be older than it."""
        return next((row for _, find in self.models.values() if (row := find(item))), {})

    def reads(self, name: str) -> bool:
        return any(name in columns.events for columns, _ in self.models.values())


class States:
    """Finds the store of a schema; takes events up in all of them."""

    def __init__(self, urls: Sequence[str], opener: Open = open_store):
        self._urls, self._open = list(urls), opener
        self.kept: list[Kept] = []

    def of(self, schema: Schema) -> Kept:
        """The store of a schema that a model of this service has."""
        mine = identity(schema)
        return next(one for one in self.kept if one.identity == mine)

    def has(self, schema: Schema) -> bool:
        return any(one.identity == identity(schema) for one in self.kept)

    def add(self, name: str, columns: Columns, kinds: Mapping[str, Any], row: Row) -> None:
        """Take in a model, in its own place if it was there; a kind of histories that is new gets a store."""
        if not self.has(columns.schema):
            mine, number = identity(columns.schema), len(self.kept)
            url = _url(self._urls[number], mine) if number < len(self._urls) else _another(self._urls[0], mine)
            store = self._open(url, columns.schema, kinds)
            local = url.startswith(("lmdb:", "memory:"))
            self.kept.append(Kept(mine, store if local else Remembered(store), local, {}))
        self.of(columns.schema).models[name] = columns, row

    def all_used(self) -> None:
        """InputError when there are more places for histories than kinds of them."""
        if len(self._urls) > len(self.kept):
            raise InputError(
                f"--state {self._urls[len(self.kept)]}: nothing goes there: the bundles keep histories of "
                f"{len(self.kept)} kind(s), each in one place"
            )

    def look(self) -> bool:
        """Ask every store whether it is well; may wait for the network."""
        for one in self.kept:
            try:
                one.well = one.store.healthy()
            except Exception as error:
                one.well = False
                one.health.failed(error)
            if one.well:
                one.health.worked()
            else:
                one.health.failed(StoreUnavailable())  # said once, if the line above did not
        return self.well

    @property
    def well(self) -> bool:
        return all(one.well for one in self.kept)

    def checked(self, events: Sequence[EventRequest], now: float, ahead: float) -> list[list[Event]]:
        """For each store the events as it takes them; Refused, before any is written, where one is wrong."""
        return [
            [_event(one, event, f"events[{number}]", self.kept, now, ahead) for number, event in enumerate(events)]
            for one in self.kept
        ]

    def append(self, events: list[list[Event]]) -> list[bool]:
        """Which of the events are new, to any store; StoreUnavailable when one could not take them."""
        if len(self.kept) > 1:  # what is wrong for the last is not in the first already
            for one, its in zip(self.kept, events):
                one.store.check(its)
        found: list[bool] = []
        for one, its in zip(self.kept, events):
            try:
                new = one.store.append(its)
            except StoreUnavailable as error:
                one.well = False
                one.health.failed(error)
                raise
            found = [a or b for a, b in zip(found, new)] if found else new
        return found

    def close(self) -> None:
        for one in self.kept:
            one.store.close()


def clock(columns: Columns) -> Any:
    """Now, as the log writes times."""
    if columns.timestamps:
        return datetime.now(timezone.utc).replace(tzinfo=None)
    return time.time() / columns.schema.time_unit


def moment(value: Any, columns: Columns, where: str) -> Any:
    """A request's time as the log writes it, moments in UTC; Refused where the log writes them otherwise."""
    if not isinstance(value, str):
        if columns.timestamps:
            raise Refused(422, "must be a moment as ISO 8601: the log has timestamps", where)
        return value
    try:
        found = datetime.fromisoformat(value.replace("Z", "+00:00"))
        found = found.astimezone(timezone.utc).replace(tzinfo=None) if found.tzinfo else found
    except (ValueError, OverflowError):
        raise Refused(422, "not a moment: write it as 2024-01-31T12:00:00Z", where) from None
    if columns.timestamps is False:
        raise Refused(422, "must be a number: the log counts time", where)
    return found


def seconds(value: Any, schema: Schema) -> float:
    """A time of the log in seconds since 1970."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=timezone.utc).timestamp()
    return value * schema.time_unit


def _event(one: Kept, event: EventRequest, where: str, all_kept: list[Kept], now: float, ahead: float) -> Event:
    """An event as a row of the log: what the item's row knows is added; Refused where a column is wrong."""
    columns, schema = one.columns, one.columns.schema
    columns.user(event.user, f"{where}.user")
    given = event.__pydantic_extra__ or {}
    for name, value in given.items():
        if name in (schema.user, schema.time):
            raise Refused(422, f"say it as {'user' if name == schema.user else 'time'!r}", f"{where}.{name}")
        if name in columns.events:
            check(columns.events[name], value, f"{where}.{name}")
        elif not any(other.reads(name) for other in all_kept):
            known = ", ".join(list(columns.events)[:20])
            raise Refused(422, f"no such column in the log: it has {known}", f"{where}.{name[:128]}")
    item = given.get(schema.item) if schema.item else None
    if schema.item and item is None:
        raise Refused(422, "needed: which item it was", f"{where}.{schema.item}")
    if schema.item:
        check(columns.items, item, f"{where}.{schema.item}")
    row = {**dict.fromkeys(columns.events), **one.row(item), **given, schema.user: event.user}
    absent = next((name for name in columns.needed if name not in given), None)
    if absent is not None:
        raise Refused(422, "needed for the history: give null if it is unknown", f"{where}.{absent}")
    if schema.time:
        row[schema.time] = moment(event.time, columns, f"{where}.time")
        if seconds(row[schema.time], schema) > now + ahead:
            raise Refused(422, "lies in the future: is its unit that of the log?", f"{where}.time")
    return Event(event.event_id, event.user, row)


def place(folder: str | Path, identity: str) -> Path:
    """Where in a folder of histories those of one kind lie, by the `identity` of their schema."""
    return Path(folder) / hashlib.sha256(identity.encode()).hexdigest()[:8]


def is_folder(state: str) -> bool:
    """Whether it names a folder for histories of any kind, and no store."""
    return not state.startswith(("lmdb:", "memory:", "redis:", "rediss:", "unix:"))


def _url(state: str, identity: str) -> str:
    return f"lmdb:{place(state, identity)}" if is_folder(state) else state


def _another(first: str, identity: str) -> str:
    """Where a further kind of histories goes when only one place was named."""
    if first == "memory:" or is_folder(first):
        return _url(first, identity)
    raise InputError(
        f"--state {first}: the bundles keep different histories: name a folder, which holds all kinds, or give one "
        "--state for each, in the bundles' order"
    )
