"""Histories in Redis, for replicas of the service that share them.

scalerec:user:KEY      hash: version, data (the past as JSON)
scalerec:event:DIGEST  nothing, there for good
scalerec:users         sorted set of the keys of all users, for the search by prefix
scalerec:facts         hash: identity of the schema, kinds of columns, count, "filling" while a seed is not complete

The fold is Python's, the same as in training; what it read and what it writes are tied by a version: a script writes a
user's past and the ids of his new events in one step, or not at all where another replica was faster. It is then done
again on what that replica wrote. How safe an acknowledged event is is up to the server (appendonly, appendfsync).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import Schema
from scalerec.serving.events import (
    Kind,
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
    user_of,
)
from scalerec.serving.store import Store, StoreUnavailable

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError:
    raise InputError("the store redis: needs the redis package: pip install redis") from None

PREFIX = "scalerec:"
CONNECT_S, ANSWER_S = 0.5, 1.0
FILL_USERS = 500
ATTEMPTS = 100  # at one user's past, each lost to another replica that got on
T = TypeVar("T")

# KEYS facts, users, user, events...   ARGV version read, key of the user, past
# 1: written; 0: not, another replica has written this user or one of these events since they were read.
WRITE = """
if (redis.call('HGET', KEYS[3], 'version') or '0') ~= ARGV[1] then return 0 end
for i = 4, #KEYS do if redis.call('EXISTS', KEYS[i]) == 1 then return 0 end end
redis.call('HSET', KEYS[3], 'version', ARGV[1] + 1, 'data', ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[2])
for i = 4, #KEYS do redis.call('SET', KEYS[i], '') end
redis.call('HINCRBY', KEYS[1], 'count', #KEYS - 3)
return 1
"""


class RedisStore(Store):
    """Every batch is two round trips; a call fails within seconds where the server is away, and nothing is retried."""

    def __init__(self, url: str, schema: Schema, kinds: Mapping[str, Kind] | None = None):
        super().__init__(schema, kinds)
        self._where = f"store {url.rpartition('@')[2]}"  # without the password
        try:
            self._redis = redis.Redis.from_url(
                url, socket_connect_timeout=CONNECT_S, socket_timeout=ANSWER_S, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise InputError(f"{self._where}: {error}; use redis://HOST:PORT/0") from None
        self._facts, self._users = f"{PREFIX}facts", f"{PREFIX}users"
        self._introduced = False
        try:
            self._introduce()
        except StoreUnavailable:
            pass  # a service may start before its server does

    def past(self, user: Any) -> history.Past:
        self._ready()
        read = [("HGET", self._facts, "filling"), ("HGET", _user(key_of(user)), "data")]
        filling, held = self._call(lambda: self._pipeline(read))
        self._complete(filling)
        return {} if held is None else unpack(held, self.schema)[1]

    def count(self) -> int:
        return int(self._call(lambda: self._redis.hget(self._facts, "count")) or 0)

    def users(self, prefix: str = "", limit: int = 100) -> list[Any]:
        begins = [text.encode() for text in beginnings(prefix)]
        commands = [("ZRANGEBYLEX", self._users, b"[" + b, b"(" + b + b"\xff", "LIMIT", 0, limit) for b in begins]
        found = self._call(lambda: self._pipeline(commands))
        return sorted((user_of(key) for keys in found for key in keys), key=by_text)[:limit]

    def healthy(self) -> bool:
        try:
            self._ready()
            self._complete(self._call(lambda: self._redis.hget(self._facts, "filling")))
        except StoreUnavailable:
            return False
        return True

    def close(self) -> None:
        self._redis.close()

    def load(self, pasts: Iterable[tuple[Any, history.Past]], kinds: Mapping[str, Kind]) -> None:
        """Fill the store, FILL_USERS in one round trip; what a killed fill has left behind is thrown away first."""
        self._ready()
        facts = [("HGET", self._facts, "filling"), ("ZCARD", self._users), ("HGET", self._facts, "count")]
        filling, users, count = self._call(lambda: self._pipeline(facts))
        if filling is None and (users or count):
            raise InputError(f"{self._where}: not empty, so it cannot be filled: name another database")
        self._call(lambda: self._redis.hset(self._facts, "filling", "1"))
        (left,) = self._call(lambda: self._pipeline([("ZRANGE", self._users, 0, -1)]))
        self._call(lambda: self._pipeline([("UNLINK", self._users, *(_user(key.decode()) for key in left))]))
        remaining = iter(pasts)
        while some := list(islice(remaining, FILL_USERS)):
            commands: list[tuple[Any, ...]] = []
            for user, past in some:
                key = key_of(user)
                packed = pack(plain(user, "user"), past, self.schema)
                commands += [("HSET", _user(key), "version", 1, "data", packed), ("ZADD", self._users, 0, key)]
            self._call(lambda commands=commands: self._pipeline(commands))
        self.kinds.update(kinds)
        self._call(lambda: self._redis.hset(self._facts, "kinds", json.dumps(self.kinds)))
        self._call(lambda: self._redis.hdel(self._facts, "filling"))

    def _write(self, rows: list[Row]) -> list[bool]:
        self._ready()
        new = [False] * len(rows)
        waiting = list(range(len(rows)))
        for _ in range(ATTEMPTS):
            waiting = self._try(rows, waiting, new)
            if not waiting:
                return new
        raise StoreUnavailable(f"{self._where}: other writers were faster {ATTEMPTS} times: send the events again")

    def _try(self, rows: list[Row], waiting: list[int], new: list[bool]) -> list[int]:
        """Write the waiting rows, note in `new` which were; the rows of users whom another replica wrote meanwhile."""
        some = [rows[i] for i in waiting]
        keys = list(dict.fromkeys(key_of(row.user) for row in some))
        read = [("HGET", self._facts, "filling"), ("MGET", *(_event(row.digest) for row in some))]
        filling, known, *found = self._call(
            lambda: self._pipeline([*read, *(("HMGET", _user(key), "version", "data") for key in keys)])
        )
        self._complete(filling)
        there = {row.digest for row, value in zip(some, known) if value is not None}
        versions = {key: version or b"0" for key, (version, _) in zip(keys, found)}
        held = {key: unpack(data, self.schema) for key, (_, data) in zip(keys, found) if data is not None}
        planned = plan(some, self.schema, there, held)
        digests: dict[str, list[bytes]] = {key: [] for key in planned.pasts}
        for row, is_new in zip(some, planned.new):
            if is_new:
                digests[key_of(row.user)].append(row.digest)
        commands = [
            ("EVAL", WRITE, 3 + len(digests[key]), self._facts, self._users, _user(key), *map(_event, digests[key]),
             versions[key], key, pack(user, events, self.schema))
            for key, (user, events) in planned.pasts.items()
        ]  # fmt: skip
        written = dict(zip(planned.pasts, self._call(lambda: self._pipeline(commands)))) if commands else {}
        again = []
        for i, row, is_new in zip(waiting, some, planned.new):
            if is_new and written[key_of(row.user)]:
                new[i] = True
            elif is_new:
                again.append(i)
        return again

    def _pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return pipeline.execute()

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (redis.RedisError, OSError) as error:
            self._introduced = False
            what = str(error).rpartition("caused error: ")[2][:300]  # without the script
            full = any(word in what for word in ("maxmemory", "OOM", "MISCONF"))
            raise StoreUnavailable(f"{self._where}: {'full, ' if full else ''}{what}") from error

    def _introduce(self) -> None:
        """Write down whose histories these are, where nobody has; InputError where they are of another schema."""
        facts = [("HSETNX", self._facts, "identity", identity(self.schema))]
        facts += [("HGET", self._facts, "identity"), ("HGET", self._facts, "kinds")]
        _, held, kinds = self._call(lambda: self._pipeline(facts))
        same_identity(self._where, held.decode(), self.schema)
        self.kinds.update(json.loads(kinds or b"{}"))
        self._introduced = True

    def _ready(self) -> None:
        """After an outage the server may be another one."""
        if not self._introduced:
            try:
                self._introduce()
            except InputError as error:
                raise StoreUnavailable(str(error)) from None

    def _complete(self, filling: Any) -> None:
        if filling is not None:
            raise StoreUnavailable(f"{self._where}: being filled, or a fill was cut off: fill it again")


def _user(key: str) -> str:
    return f"{PREFIX}user:{key}"


def _event(digest: bytes) -> bytes:
    return PREFIX.encode() + b"event:" + digest
