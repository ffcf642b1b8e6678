"""What users did, kept for the next request: events go in once, histories come out as training's `replay` gives them.

A store keeps of every user a `history.Past`: the entries of the schema's sequences with their times. Ids of events are
kept as 128-bit digests for good, so an event that is sent again, by whomever and whenever, does nothing.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import Schema
from scalerec.serving.events import Checker, Event, Kind, Pasts, Row, by_text, key_of, plain, plan


class StoreUnavailable(Exception):
    """The store cannot be reached or cannot write now; nothing was acknowledged, and trying again is safe."""


class Known(NamedTuple):
    """What a store says of a user in one read."""

    history: history.State
    seen: list[Any]  # item ids of all kept events, each once
    stale: bool  # from memory, since the store cannot be reached
    last: Any = None  # the time of the latest event that is kept


class Store(ABC):
    """Histories of users behind a few calls that threads and, where the store allows, processes make at once."""

    def __init__(self, schema: Schema, kinds: Mapping[str, Kind] | None = None):
        """`kinds` says of columns what their values are; of others a user's first value decides."""
        self.schema = schema
        self.kinds: dict[str, Kind] = dict(kinds or {})
        self._check = Checker(schema, self.kinds)
        self._items = [
            (sequence.name, i)
            for sequence in schema.sequences
            for i, column in enumerate(history.entry_columns(sequence, schema)[: len(sequence.fields)])
            if column == schema.item or (schema.item is None and i == 0)
        ]

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Take the events up; when it returns they are safe. False: its id was there already, and nothing was done.

        Raises:
            InputError: an event is not what the schema needs; it names the event and the field, and none was taken up.
            StoreUnavailable: the store cannot be reached or is full: send the same events again later.
        """
        rows = self._check.rows(events)
        return self._write(rows) if rows else []

    def check(self, events: Sequence[Event]) -> None:
        """InputError, as `append` raises it, for what is wrong whatever the users' earlier events are."""
        self._check.rows(events)

    def history(self, user: Any, before: Any = None) -> history.State:
        """The user's history, {} where nobody knows him; only of events earlier than `before`, where it is given."""
        return self.known(user, before).history

    def seen(self, user: Any) -> list[Any]:
        """The item ids of all events kept of the user."""
        return self.known(user).seen

    def known(self, user: Any, before: Any = None) -> Known:
        """History and seen items in one read."""
        return self._known(self.past(user), before, stale=False)

    @abstractmethod
    def past(self, user: Any) -> history.Past:
        """All that is kept of a user."""

    @abstractmethod
    def load(self, pasts: Iterable[tuple[Any, history.Past]], kinds: Mapping[str, Kind]) -> None:
        """Fill an empty store with the pasts of users; InputError where it is not empty."""

    @abstractmethod
    def count(self) -> int:
        """How many events were taken up since the store was made, those it was filled with not counted."""

    @abstractmethod
    def users(self, prefix: str = "", limit: int = 100) -> list[Any]:
        """Known users whose id begins with the text, numbers by their digits; in the order of the text."""

    @abstractmethod
    def healthy(self) -> bool:
        """Whether it can be read now."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _write(self, rows: list[Row]) -> list[bool]: ...

    def _known(self, past: history.Past, before: Any, stale: bool) -> Known:
        before = None if before is None else self._check.time(before)
        try:
            state = history.until(past, self.schema, before)
        except TypeError:
            what = f"{before} is no time like those of the user's history"
            raise InputError(f"{self.schema.time!r}: {what}") from None
        seen = {entry[i]: None for name, i in self._items for _, entry in past.get(name, ()) if entry[i] is not None}
        times = [events[-1][0] for events in past.values() if events and events[-1][0] is not None]
        return Known(state, list(seen), stale, max(times, default=None))


def open_store(url: str, schema: Schema, kinds: Mapping[str, Kind] | None = None) -> Store:
    """The store at "lmdb:FOLDER", "redis://host:port/0" or "memory:"; InputError where another schema's lies there."""
    where = url.partition(":")[2]
    if url == "memory:":
        return MemoryStore(schema, kinds)
    if url.startswith("lmdb:") and where:
        from scalerec.serving.lmdb_store import LMDBStore

        return LMDBStore(where, schema, kinds)
    if url.startswith(("redis://", "rediss://", "unix://")):
        from scalerec.serving.redis_store import RedisStore

        return RedisStore(url, schema, kinds)
    raise InputError(f"store {url!r}: unknown: use lmdb:FOLDER, redis://HOST:PORT/0 or memory:")


class MemoryStore(Store):
    """In this process only, and gone with it: for tests and for trying things out."""

    def __init__(self, schema: Schema, kinds: Mapping[str, Kind] | None = None):
        super().__init__(schema, kinds)
        self._pasts: Pasts = {}
        self._digests: set[bytes] = set()
        self._lock = threading.Lock()

    def past(self, user: Any) -> history.Past:
        return self._pasts.get(key_of(user), (None, {}))[1]

    def load(self, pasts: Iterable[tuple[Any, history.Past]], kinds: Mapping[str, Kind]) -> None:
        if self._pasts or self._digests:
            raise InputError("memory store: not empty, so it cannot be filled")
        self.kinds |= kinds
        self._pasts = {key_of(user): (plain(user, "user"), past) for user, past in pasts}

    def count(self) -> int:
        return len(self._digests)

    def users(self, prefix: str = "", limit: int = 100) -> list[Any]:
        found = [user for user, _ in list(self._pasts.values()) if str(user).startswith(prefix)]
        return sorted(found, key=by_text)[:limit]

    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def _write(self, rows: list[Row]) -> list[bool]:
        with self._lock:
            planned = plan(rows, self.schema, self._digests, self._pasts)
            self._pasts |= planned.pasts
            self._digests.update(planned.digests)
        return planned.new


class Remembered(Store):
    """Another store with a memory: while that cannot be reached, the last known state is served, marked stale."""

    def __init__(self, store: Store, users: int = 100_000, retry_s: float = 1.0):
        """Remembers the last `users` users; a store that failed is asked again after `retry_s` seconds."""
        super().__init__(store.schema, store.kinds)
        self.store, self.limit, self.retry_s = store, users, retry_s
        self._pasts: OrderedDict[str, history.Past] = OrderedDict()
        self._lock = threading.Lock()
        self._down_until = 0.0

    @property
    def stale(self) -> bool:
        """Whether reads come from memory now."""
        return time.monotonic() < self._down_until

    def append(self, events: Sequence[Event]) -> list[bool]:
        new = self.store.append(events)
        self._down_until = 0.0
        for user in {key_of(event.user): event.user for event in events if key_of(event.user) in self._pasts}.values():
            self._read(user)  # what it remembers has the new event
        return new

    def check(self, events: Sequence[Event]) -> None:
        self.store.check(events)

    def past(self, user: Any) -> history.Past:
        return self._read(user)[0]

    def known(self, user: Any, before: Any = None) -> Known:
        past, stale = self._read(user)
        return self._known(past, before, stale)

    def load(self, pasts: Iterable[tuple[Any, history.Past]], kinds: Mapping[str, Kind]) -> None:
        self.store.load(pasts, kinds)

    def count(self) -> int:
        return self.store.count()

    def users(self, prefix: str = "", limit: int = 100) -> list[Any]:
        return self.store.users(prefix, limit)

    def healthy(self) -> bool:
        return self.store.healthy()

    def close(self) -> None:
        self.store.close()

    def _write(self, rows: list[Row]) -> list[bool]:
        return self.store._write(rows)

    def _read(self, user: Any) -> tuple[history.Past, bool]:
        key = key_of(user)
        if not self.stale:
            try:
                past = self.store.past(user)
                with self._lock:
                    self._pasts[key] = past
                    self._pasts.move_to_end(key)
                    if len(self._pasts) > self.limit:
                        self._pasts.popitem(last=False)
                return past, False
            except StoreUnavailable:
                self._down_until = time.monotonic() + self.retry_s
        return self._pasts.get(key, {}), True
