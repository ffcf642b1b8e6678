"""Histories in LMDB: one folder, any number of threads and processes of one machine, no server.

users   key of a user -> his past as JSON
events  digest of an event's id -> nothing
facts   identity of the schema, kinds of columns, count, "filling" while a seed is not complete

A commit is on the disk when it returns. Batches that wait for the disk at the same time share one commit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import Schema
from scalerec.serving.events import (
    Kind,
    Pasts,
    Row,
    beginnings,
    by_text,
    identity,
    key_of,
    pack,
    plain,
    plan,
    same_identity,
    unpack,
)
from scalerec.serving.store import Store, StoreUnavailable

try:
    import lmdb
except ImportError:
    raise InputError("the store lmdb: needs the lmdb package: pip install lmdb") from None

FIRST_BYTES = 64 << 20  # of the map, which doubles when it is full
MOST_BYTES = 1 << 40
KEY_BYTES = 400  # LMDB takes 511; what is longer ends in its digest
FILL_USERS = 2_000  # in one commit
T = TypeVar("T")


class _Waiting:
    """A batch on its way into a commit."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.new: list[bool] | None = None
        self.error: BaseException | None = None
        self.leads = False
        self.woken = threading.Event()  # written, or to lead the next commit


class LMDBStore(Store):
    """An acknowledged event survives kill -9 and loss of power; the map grows by itself up to `most_bytes`."""

    def __init__(
        self, folder: str | Path, schema: Schema, kinds: Mapping[str, Kind] | None = None, *,
        first_bytes: int = FIRST_BYTES, most_bytes: int = MOST_BYTES,
    ):  # fmt: skip
        super().__init__(schema, kinds)
        self.folder, self.most_bytes = Path(folder), most_bytes
        self._gate = _Gate()
        self._writing = threading.Lock()
        self._queue: list[_Waiting] = []
        self._leading = False  # somebody writes, or is woken to write
        self._queued = threading.Lock()
        self._first_bytes = first_bytes
        self._broken = False
        try:
            self._open()
        except (lmdb.Error, OSError) as error:
            raise InputError(f"store {self.folder}: cannot be opened ({error})") from None
        try:
            held = self._transact(self._introduce)
            same_identity(f"store {self.folder}", held, schema)
        except Exception:
            self._env.close()
            raise
        self.kinds.update(json.loads(self._fact(b"kinds") or b"{}"))

    def past(self, user: Any) -> history.Past:
        key = _key(key_of(user))
        with self._reading() as transaction:
            self._complete(transaction)
            held = transaction.get(key, db=self._users)
        return {} if held is None else unpack(held, self.schema)[1]

    def count(self) -> int:
        return int(self._fact(b"count") or b"0")

    def users(self, prefix: str = "", limit: int = 100) -> list[Any]:
        found: list[Any] = []
        with self._reading() as transaction:
            for begin in beginnings(prefix):
                users = self._beginning(transaction, begin.encode()[:KEY_BYTES])
                found += islice((user for user in users if str(user).startswith(prefix)), limit)
        return sorted(found, key=by_text)[:limit]

    def healthy(self) -> bool:
        try:
            with self._reading() as transaction:
                self._complete(transaction)
        except StoreUnavailable:
            return False
        return True

    def close(self) -> None:
        with self._writing, self._gate.alone():
            self._env.close()

    def load(self, pasts: Iterable[tuple[Any, history.Past]], kinds: Mapping[str, Kind]) -> None:
        """Fill the store in commits of FILL_USERS; what a killed fill has left behind is thrown away first."""
        with self._writing:
            self._transact(self._begin_filling)
            remaining = iter(pasts)
            while some := list(islice(remaining, FILL_USERS)):
                packed = [
                    (_key(key_of(user)), pack(plain(user, "user"), past, self.schema)) for user, past in some if past
                ]

                def put(transaction: Any, packed: list[tuple[bytes, bytes]] = packed) -> None:
                    for key, value in packed:
                        transaction.put(key, value, db=self._users)

                self._transact(put)
            self.kinds.update(kinds)
            self._transact(self._end_filling)

    def _open(self, create: bool = True) -> None:
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        size = self._first_bytes
        self._env = lmdb.open(str(self.folder), map_size=size, max_dbs=3, max_readers=1024, create=create)
        self._env.reader_check()  # slots of processes that were killed
        self._users, self._events, self._facts = (
            self._env.open_db(name, create=create) for name in (b"users", b"events", b"facts")
        )

    # -- writing

    def _write(self, rows: list[Row]) -> list[bool]:
        """One commit for all batches that are there when it begins; the first of later ones leads the next."""
        mine = _Waiting(rows)
        with self._queued:
            self._queue.append(mine)
            mine.leads = not self._leading
            self._leading = True
        if not mine.leads:
            mine.woken.wait()
        if mine.leads:
            self._lead()
        if mine.error is not None:
            raise mine.error
        assert mine.new is not None
        return mine.new

    def _lead(self) -> None:
        with self._writing:
            with self._queued:
                waiting, self._queue = self._queue, []
            try:
                self._transact(lambda transaction: self._write_all(transaction, waiting))
            except BaseException as error:
                for one in waiting:
                    one.new, one.error = None, error
        with self._queued:
            self._leading = bool(self._queue)
            if self._queue:
                self._queue[0].leads = True
                self._queue[0].woken.set()
        for one in waiting:
            one.woken.set()

    def _write_all(self, transaction: Any, waiting: list[_Waiting]) -> None:
        """Every batch that is right; one that is not changes nothing and takes nobody with it."""
        self._complete(transaction)
        rows = [row for one in waiting for row in one.rows]
        keys = {_key(key): key for key in (key_of(row.user) for row in rows)}
        with transaction.cursor(db=self._users) as users, transaction.cursor(db=self._events) as events:
            held = dict(users.getmulti(sorted(keys)))
            there = {digest for digest, _ in events.getmulti(sorted({row.digest for row in rows}))}
            pasts = {keys[key]: unpack(value, self.schema) for key, value in held.items()}
            changed: Pasts = {}
            new: list[bytes] = []
            for one in waiting:
                one.new, one.error = None, None
                try:
                    planned = plan(one.rows, self.schema, there, pasts)
                except Exception as error:
                    one.error = error
                    continue
                one.new = planned.new
                pasts |= planned.pasts
                changed |= planned.pasts
                new += planned.digests
                there.update(planned.digests)
            packed = [(_key(key), pack(user, past, self.schema)) for key, (user, past) in changed.items()]
            users.putmulti(sorted(packed))
            events.putmulti(sorted((digest, b"") for digest in new))
        count = int(transaction.get(b"count", b"0", db=self._facts))
        transaction.put(b"count", str(count + len(new)).encode(), db=self._facts)

    def _transact(self, work: Callable[[Any], T]) -> T:
        """`work` in one write transaction, again in a larger map where it was too small."""
        while True:
            try:
                with self._gate.together(), self._env.begin(write=True) as transaction:
                    return work(transaction)
            except lmdb.MapResizedError:
                self._adopt()
            except lmdb.MapFullError:
                self._grow()
            except (lmdb.Error, OSError) as error:
                self._recover(error)
                raise StoreUnavailable(
                    f"store {self.folder}: not written, {self._why(error)}; nothing was lost"
                ) from error

    def _grow(self) -> None:
        with self._gate.alone():
            size = self._env.info()["map_size"]
            if size >= self.most_bytes:
                raise StoreUnavailable(
                    f"store {self.folder}: not written, its map has all {self.most_bytes:,} bytes that it may have; "
                    "nothing was lost"
                )
            self._env.set_mapsize(min(2 * size, self.most_bytes))

    def _adopt(self) -> None:
        """Take over the size to which another process has let the map grow."""
        with self._gate.alone():
            self._env.set_mapsize(0)

    def _recover(self, error: Exception) -> None:
        """After a failed write of its first pages LMDB wants to be opened again; what was committed is there."""
        self._broken |= isinstance(error, lmdb.PanicError)
        if self._broken:
            with self._gate.alone():
                self._env.close()
                try:
                    self._open(create=False)  # where a volume has gone no new store is wanted
                    self._broken = False
                except (lmdb.Error, OSError):
                    pass  # stays closed: the next call fails as well, and tries again

    def _why(self, error: Exception) -> str:
        # A disk that takes only a part of a write shows as an error of input and output.
        if any(words in str(error) for words in ("No space left", "Input/output", "File too large", "quota")):
            free = shutil.disk_usage(self.folder).free
            return f"the disk is full or failing ({error}; {free:,} bytes are free)"
        return str(error)

    # -- reading

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        while True:
            try:
                with self._gate.together():
                    transaction = self._env.begin()
                    try:
                        yield transaction
                    finally:
                        transaction.abort()
                return
            except lmdb.MapResizedError:
                self._adopt()
            except (lmdb.Error, OSError) as error:
                self._recover(error)
                raise StoreUnavailable(f"store {self.folder}: cannot be read ({error})") from error

    def _fact(self, name: bytes) -> bytes | None:
        with self._reading() as transaction:
            return transaction.get(name, db=self._facts)

    def _beginning(self, transaction: Any, prefix: bytes) -> Iterator[Any]:
        """The users whose keys begin with the prefix."""
        cursor = transaction.cursor(db=self._users)
        going = cursor.set_range(prefix)
        while going and cursor.key().startswith(prefix):
            yield unpack(cursor.value(), self.schema)[0]
            going = cursor.next()

    # -- facts

    def _introduce(self, transaction: Any) -> str:
        """Write down whose histories these are, where nobody has; what is written there."""
        mine = identity(self.schema).encode()
        transaction.put(b"identity", mine, overwrite=False, db=self._facts)
        return transaction.get(b"identity", db=self._facts).decode()

    def _complete(self, transaction: Any) -> None:
        if transaction.get(b"filling", db=self._facts) is not None:
            raise StoreUnavailable(f"store {self.folder}: being filled, or a fill was cut off: fill it again")

    def _begin_filling(self, transaction: Any) -> None:
        if transaction.get(b"filling", db=self._facts) is not None:
            transaction.drop(self._users, delete=False)
        elif transaction.stat(self._users)["entries"] or transaction.stat(self._events)["entries"]:
            raise InputError(f"store {self.folder}: not empty, so it cannot be filled: name a new folder")
        transaction.put(b"filling", b"", db=self._facts)

    def _end_filling(self, transaction: Any) -> None:
        transaction.put(b"kinds", json.dumps(self.kinds).encode(), db=self._facts)
        transaction.delete(b"filling", db=self._facts)


class _Gate:
    """Transactions pass together; whoever changes the size of the map goes through alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


def _key(text: str) -> bytes:
    key = text.encode()
    if len(key) <= KEY_BYTES:
        return key
    return key[:KEY_BYTES] + hashlib.blake2b(key, digest_size=16).digest()
